"""Slots that decode together: exact, independent of each other, compiled once."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import TINY, in_soak, mesh_sizes, random_params
from slot_answers import (
    CHUNK,
    DRAWN,
    GREEDY,
    LENGTH,
    LONG,
    MIDDLE,
    ROUNDS,
    SHORT,
    SLOTS,
)

from research.config.knob_groups import ModelConfig
from research.engine.requests import Sampling
from research.engine.slot_decoder import SlotDecoder, SlotSettings
from research.engine.slot_programs import CacheBlock
from research.models.architecture import Experts
from research.models.cached_attention import attend_cached, cache_partition
from research.models.make_model import make_model
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.parallel.logit_rows import make_gather_head
from research.weights.parameter_spec import Spec

WORDS = -(-TINY.vocab // 32)


def begin(decoder, slot, prompt, sampling=GREEDY, stop=(), top=3):
    decoder.admit(slot, SlotSettings(sampling, frozenset(stop), 0, top, prompt))
    for at in range(0, len(prompt) - 1, CHUNK):
        decoder.extend(slot, prompt[:-1][at : at + CHUNK])
    decoder.start(slot, prompt[-1])


def take(round_, slot):
    """Ids and scores of a slot's tokens in one call."""
    scores = [np.asarray(x)[:, slot] for x in jax.tree.leaves(round_.scores)]
    turns = np.flatnonzero(round_.ids[:, slot] >= 0)
    return [(int(round_.ids[r, slot]), *(x[r].tolist() for x in scores)) for r in turns]


def finish(decoder, *slots):
    """Decodes until these slots have ended; the tokens of each."""
    said, active = {slot: [] for slot in slots}, True
    while active:
        round_ = decoder.decode()
        for slot in slots:
            said[slot] += take(round_, slot)
        active = any(round_.active[slot] for slot in slots)
    for slot in slots:
        decoder.free(slot)
    return [said[slot] for slot in slots]


def test_answers_are_those_of_the_full_forward_pass(decoder, full_scores):
    prompts = SHORT, MIDDLE, LONG
    for slot, prompt in enumerate(prompts):
        begin(decoder, slot, prompt)
    for prompt, said in zip(prompts, finish(decoder, 0, 1, 2), strict=True):
        ids, logprobs, top_ids, top = zip(*said, strict=True)
        expected = full_scores([*prompt, *ids])[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(ids, expected.argmax(-1))
        np.testing.assert_allclose(logprobs, expected.max(-1), atol=2e-5)
        # The chosen id is the likeliest, and has one score, to the last bit.
        assert logprobs == tuple(x[0] for x in top)
        assert ids == tuple(x[0] for x in top_ids)
        found = np.take_along_axis(expected, np.array(top_ids), axis=-1)
        np.testing.assert_allclose(top, found, atol=2e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_an_answer_does_not_depend_on_slot_or_load(decoder, sampling):
    traces = decoder.traces
    begin(decoder, 0, MIDDLE, sampling)
    (alone,) = finish(decoder, 0)
    assert len(alone) == 12 and len({x[0] for x in alone}) > 3
    for slot in range(SLOTS):
        others = [s for s in range(SLOTS) if s != slot]
        # One neighbour ends while the request decodes, one begins; lengths differ.
        begin(decoder, others[0], LONG, Sampling(1.0, max_new_tokens=5, seed=slot))
        decoder.decode()
        begin(decoder, slot, MIDDLE, sampling)
        said = take(decoder.decode(), slot)
        begin(decoder, others[1], SHORT, DRAWN)
        said += finish(decoder, slot)[0]
        assert said == alone
        for other in others[:2]:
            decoder.free(other)
    assert decoder.traces == traces


def test_a_slot_ends_inside_a_call(decoder):
    begin(decoder, 0, MIDDLE)
    ids = [x[0] for x in finish(decoder, 0)[0]]
    at = next(i for i in range(2, 12, ROUNDS) if ids[i] not in ids[:i])
    begin(decoder, 0, MIDDLE, stop=[ids[at]])
    begin(decoder, 1, MIDDLE, Sampling(max_new_tokens=at))
    begin(decoder, 2, MIDDLE, Sampling(max_new_tokens=8, min_new_tokens=8), stop=ids)
    stopped, limited, held = ([x[0] for x in s] for s in finish(decoder, 0, 1, 2))
    assert stopped == ids[: at + 1] and limited == ids[:at]
    assert len(held) == 8 and not set(held[:8]) & set(ids)


def test_a_constraint_holds_for_one_token_at_a_time(decoder):
    begin(decoder, 0, MIDDLE)
    begin(decoder, 1, MIDDLE)
    for wanted in (77, 5):
        bits = np.zeros(WORDS, np.int32)
        bits[wanted // 32] = np.uint32(1 << wanted % 32).astype(np.int32)
        decoder.constrain(0, bits)
        round_ = decoder.decode()
        assert [x[0] for x in take(round_, 0)] == [wanted]
        assert len(take(round_, 1)) == ROUNDS
    decoder.constrain(0, None)
    assert len(take(decoder.decode(), 0)) == ROUNDS
    decoder.free(0), decoder.free(1)


def test_a_prefix_read_from_one_slot_continues_in_another(decoder):
    """Bit for bit as if its chunks had been computed there."""
    begin(decoder, 0, LONG, DRAWN)
    blocks = [decoder.read_block(0, index) for index in range(5)]
    (expected,) = finish(decoder, 0)
    decoder.admit(2, SlotSettings(DRAWN, top=3, prompt_ids=LONG))
    for index, block in enumerate(blocks):
        decoder.write_block(2, index, block)
    for at in range(5 * CHUNK, len(LONG) - 1, CHUNK):
        decoder.extend(2, LONG[:-1][at : at + CHUNK])
    decoder.start(2, LONG[-1])
    assert finish(decoder, 2) == [expected]
    with pytest.raises(ValueError, match="slot 2 has 0 tokens"):
        decoder.write_block(2, 1, blocks[1])


@pytest.mark.parametrize("prompt", [SHORT, MIDDLE, LONG], ids=len)
def test_a_prompt_that_a_pass_over_rows_has_read_is_not_read_again(
    decoder, model, params, prompt, monkeypatch
):
    """Its keys in a packed row, behind another document, are those of the engine."""
    tokens = np.array([[7, 8, 9, *prompt, 3]])
    segments = np.array([[1] * 3 + [2] * (len(prompt) + 1)])
    positions = np.array([[*range(3), *range(len(prompt) + 1)]])
    kept = []
    keeping = model.with_options(keep=lambda *keys: kept.extend(keys))
    keeping.hidden(params, tokens, positions, segments)
    begin(decoder, 1, prompt, DRAWN)
    (expected,) = finish(decoder, 1)
    given = [
        np.asarray(x)[:, 0, 3 : 2 + len(prompt)].swapaxes(1, 2)[:, None] for x in kept
    ]
    decoder.admit(1, SlotSettings(DRAWN, frozenset(), 0, 3, prompt))
    monkeypatch.setattr(decoder, "_extend", None)
    decoder.write_prompt(1, CacheBlock(*given))
    decoder.start(1, prompt[-1])
    (found,) = finish(decoder, 1)
    ids, logprobs, *_ = zip(*found, strict=True)
    assert ids == tuple(x[0] for x in expected)
    np.testing.assert_allclose(logprobs, [x[1] for x in expected], atol=2e-5)


def test_scores_of_a_text_are_those_of_the_full_forward_pass(decoder, full_scores):
    decoder.admit(1, SlotSettings(GREEDY))
    found = [
        decoder.score(1, LONG[:-1][at : at + CHUNK], LONG[1:][at : at + CHUNK], top=5)
        for at in range(0, len(LONG) - 1, CHUNK)
    ]
    decoder.free(1)
    logprobs, top_ids, top = map(
        np.concatenate, zip(*map(jax.tree.leaves, found), strict=True)
    )
    expected = full_scores(LONG)[:-1]
    own = expected[np.arange(len(expected)), LONG[1:]]
    np.testing.assert_allclose(logprobs, own, atol=2e-5)
    np.testing.assert_array_equal(top_ids[:, 0], expected.argmax(-1))
    np.testing.assert_allclose(top[:, 0], expected.max(-1), atol=2e-5)
    listed = top_ids == np.array(LONG[1:])[:, None]
    assert listed.any() and set(top[listed]) <= set(logprobs)


def test_the_state_is_donated_and_never_copied(decoder):
    held = decoder._state
    size = held.k.nbytes + held.v.nbytes
    memory = decoder._decode.lower(decoder.params, held).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size
    decoder.decode()
    assert held.k.is_deleted() and held.v.is_deleted()


def test_closing_frees_the_state_and_compiles_nothing_again(decoder):
    begin(decoder, 0, MIDDLE)
    (before,) = finish(decoder, 0)
    traces, held, params = decoder.traces, decoder._state, decoder.params
    decoder.close()
    assert decoder.params is None and decoder._state is None
    del held
    decoder.open(params)
    begin(decoder, 0, MIDDLE)
    assert finish(decoder, 0) == [before] and decoder.traces == traces


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_numbers_that_are_not_finite_stay_in_their_slot(model, platform):
    """A slot's next request finds them beyond its own tokens, masked."""
    attend = jax.jit(functools.partial(attend_cached, platform=platform))
    cache = model.init_cache(1, 4)
    x = np.full((1, 3, TINY.heads, TINY.head_dim), np.nan, np.float32)
    keys = x[:, :, : TINY.kv_heads]
    at = np.int32(0), np.int32(0), np.array([0])
    broken, k, v = attend(x, keys, keys, cache.k, cache.v, *at)
    fine = np.ones_like(x[:, :1]), *[np.ones_like(keys[:, :1])] * 2
    found, *_ = attend(*fine, k, v, *at)
    assert np.isnan(broken).all()
    np.testing.assert_array_equal(found, 1)


def test_accelerators_and_cpus_write_and_attend_alike():
    """Two rows of three tokens into the middle of a cache; then none, not kept."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(2, 3, n, 10)).astype(np.float32) for n in (8, 4, 4))
    held = rng.normal(size=(2, 2, 4, 4, 256, 10)).astype(np.float32)
    where = np.int32(1), np.int32(2), np.array([200, 7])
    expected, found = (
        jax.jit(functools.partial(attend_cached, platform=platform))(
            q, k, v, *held, *where
        )
        for platform in ("cpu", "gpu")
    )
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for new, one, other, before in zip(
        (k, v), found[1:], expected[1:], held, strict=True
    ):
        changed = before.copy()
        for row, at in enumerate(where[2]):
            changed[1, 2 + row, :, at : at + 3] = new[row].transpose(1, 0, 2)
        np.testing.assert_array_equal(one, changed)
        np.testing.assert_array_equal(other, changed)
    for platform in ("cpu", "gpu"):
        attend = jax.jit(functools.partial(attend_cached, platform=platform))
        same = attend(q, k, v, *held, *where, kept=np.bool(False))[1:]
        np.testing.assert_array_equal(same, held)


def four_answers(decoder):
    """Prompts of many lengths; one begins with blocks that were read and written."""
    tail = 5 * CHUNK
    begin(decoder, 3, LONG)
    blocks = [decoder.read_block(3, i) for i in range(5)]
    decoder.admit(3, SlotSettings(GREEDY, top=3))
    for i, block in enumerate(blocks):
        decoder.write_block(3, i, block)
    for at in range(tail, len(LONG) - 1, CHUNK):
        decoder.extend(3, LONG[:-1][at : at + CHUNK])
    decoder.start(3, LONG[-1])
    begin(decoder, 0, SHORT)
    begin(decoder, 1, MIDDLE, DRAWN)
    begin(decoder, 2, MIDDLE)
    return finish(decoder, 0, 1, 2, 3)


@pytest.mark.parametrize(
    "sizes, split, chosen_on",
    [
        (mesh_sizes(fsdp=2, tensor=2), (2, 2), 4),
        # Four slots do not divide over eight devices, so fewer choose, or each all.
        in_soak(mesh_sizes(data=2, tensor=2, fsdp=2), (4, 2), 4),
        in_soak(mesh_sizes(tensor=4, context=2), (1, 4), 4),
        in_soak(mesh_sizes(data=8), (1, 1), 1),
        in_soak(mesh_sizes(fsdp=2, context=2), (2, 1), 2),
    ],
)
def test_a_mesh_gives_the_answers_of_one_device(
    decoder, model, params, sizes, split, chosen_on, capfd
):
    count = math.prod(dataclasses.astuple(sizes))
    mesh = meshes.make_mesh(sizes, jax.devices()[:count])
    placed = jax.device_put(params, meshes.shardings(model.specs, mesh))
    sharded = SlotDecoder(
        model, placed, SLOTS, LENGTH, mesh=mesh, chunk=CHUNK, rounds=ROUNDS
    )
    sharded.warm_up()
    traces = sharded.traces
    for found, expected in zip(
        four_answers(sharded), four_answers(decoder), strict=True
    ):
        assert [x[0] for x in found] == [x[0] for x in expected]
        scores = [[x[1] for x in said] for said in (found, expected)]
        np.testing.assert_allclose(*scores, atol=2e-5)
    assert sharded.traces == traces
    keys = sharded._state.k
    part = keys.sharding.shard_shape(keys.shape)
    assert (keys.shape[1] // part[1], keys.shape[2] // part[2]) == split
    counts = sharded._state.rows.choice.counts
    assert counts.sharding.shard_shape(counts.shape)[0] * chosen_on == SLOTS
    # XLA says so where it has to copy a whole array to split it in another way.
    assert "rematerialization" not in capfd.readouterr().err


def test_a_head_is_gathered_over_the_axes_of_the_batch_alone():
    mesh = meshes.make_mesh(mesh_sizes(fsdp=2, tensor=2), jax.devices()[:4])
    specs = {"head.kernel": Spec((8, 6), ("embed", "vocab"))}
    drawn = np.arange(48.0).reshape(8, 6)
    head = jax.device_put({"head.kernel": drawn}, meshes.shardings(specs, mesh))
    assert head["head.kernel"].sharding.shard_shape((8, 6)) == (4, 3)
    [found] = jax.jit(make_gather_head(mesh, specs))(head).values()
    assert found.sharding.shard_shape((8, 6)) == (8, 3)
    np.testing.assert_array_equal(found, drawn)
    codes = (drawn, drawn)  # In another form, as in codes or beside an adapter.
    assert make_gather_head(mesh, specs)({"head.kernel": codes})["head.kernel"] is codes


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [mesh_sizes(fsdp=2, expert=2), mesh_sizes(expert=8)])
def test_experts_on_a_mesh_give_the_answers_of_one_device(sizes):
    """Slots that divide over the devices, and slots that do not."""
    experts = Experts(count=8, chosen=2)
    shape = dataclasses.replace(TINY, mlp=24, experts=experts)
    params = random_params(Model(shape).specs)
    found = []
    for each in (mesh_sizes(), sizes):
        count = math.prod(dataclasses.astuple(each))
        mesh = meshes.make_mesh(each, jax.devices()[:count])
        config = ModelConfig(dtype="float32")
        model = make_model(config, shape, mesh, length=LENGTH, rows=1)
        placed = jax.device_put(params, meshes.shardings(model.specs, mesh))
        decoder = SlotDecoder(
            model, placed, SLOTS, LENGTH, mesh=mesh, chunk=CHUNK, rounds=ROUNDS
        )
        found.append(four_answers(decoder))
    for one, many in zip(*found, strict=True):
        assert [x[0] for x in one] == [x[0] for x in many]
        scores = [[x[1] for x in said] for said in (one, many)]
        np.testing.assert_allclose(*scores, atol=2e-5)


def test_slots_and_heads_that_do_not_divide_stay_whole():
    mesh = meshes.make_mesh(mesh_sizes(data=2, tensor=4))
    found = [cache_partition(mesh, *sizes)[1:3] for sizes in ((4, 8), (3, 8), (4, 6))]
    assert found == [
        (meshes.BATCH_AXES, "tensor"),
        (None, "tensor"),
        (meshes.BATCH_AXES, None),
    ]


def test_each_program_is_traced_and_compiled_once(decoder):
    """After all tests above; jit also tells apart how arguments lie on devices."""
    begin(decoder, 0, MIDDLE)
    finish(decoder, 0)
    programs = {k: x for k, x in vars(decoder).items() if hasattr(x, "lower")}
    sizes = {name: x._cache_size() for name, x in programs.items()}
    # One program extends by each size.
    assert decoder.sizes == [2, 4, 8] and sizes.pop("_extend") == 3
    assert [*sizes.values()] == [1] * 7 and decoder.traces == 10


def test_a_short_end_of_a_prompt_takes_a_small_program(decoder):
    ran, extend = [], decoder._extend
    decoder._extend = lambda *given: ran.append(given[3].shape[1]) or extend(*given)
    try:
        for count in (19, 20, 21, 22):
            begin(decoder, 0, LONG[:count])
            decoder.free(0)
    finally:
        decoder._extend = extend
    assert ran == [8, 8, 2, 8, 8, 4, 8, 8, 4, 8, 8, 8]


OPTIMIZED = """
import jax, jax.numpy as jnp, numpy as np
from helpers import random_params
from research.engine.requests import Sampling
from research.engine.slot_decoder import SlotDecoder, SlotSettings
from research.models.architecture import Architecture
from research.models.transformer import Model

shape = Architecture(1000, 192, 512, 4, 6, 2, 32, tied_head=True)
model = Model(shape).with_options(dtype=jnp.bfloat16)
params = {p: jnp.bfloat16(x) for p, x in random_params(model.specs).items()}
decoder = SlotDecoder(model, params, 7, 400)
decoder.warm_up()
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 1000, n).tolist() for n in (150, 3, 300, 77, 1, 129, 64)]

def begin(slot, prompt, sampling):
    decoder.admit(slot, SlotSettings(sampling, top=5, prompt_ids=prompt))
    for at in range(0, len(prompt) - 1, decoder.chunk):
        decoder.extend(slot, prompt[:-1][at : at + decoder.chunk])
    decoder.start(slot, prompt[-1])

def answer(slot):
    said = []
    while len(said) < 20:
        round_ = decoder.decode()
        said.append([x[0, slot].tolist() for x in jax.tree.leaves(round_.scores)])
        said[-1].append(int(round_.ids[0, slot]))
    return said

for sampling in (
    Sampling(max_new_tokens=20),
    Sampling(1.0, 0.9, repetition_penalty=1.2, max_new_tokens=20, seed=5),
):
    found = []
    for slot in range(7):
        begin(slot, prompts[0], sampling)
        found.append(answer(slot))
        for other in {*range(7)} - {slot}:
            limit = 3 + 5 * other
            begin(other, prompts[other], Sampling(other % 2, max_new_tokens=limit))
        decoder.decode()
        begin(slot, prompts[0], sampling)
        found.append(answer(slot))
        for other in range(7):
            decoder.free(other)
    assert all(x == found[0] for x in found)
    print(len(found), len({x[0] for x in found[0]}))
"""


@pytest.mark.soak
def test_optimized_programs_do_not_let_slots_depend_on_each_other():
    """The compiler of real runs, which splits products over threads and vectors."""
    root = Path(__file__).parents[2]
    env = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    env |= {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": f"{root}:{root}/tests/support"}
    done = subprocess.run(
        [sys.executable, "-c", OPTIMIZED], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [[*map(int, line.split())] for line in done.stdout.splitlines()]
    assert len(counts) == 2 and all(n == 14 and scores > 9 for n, scores in counts)
