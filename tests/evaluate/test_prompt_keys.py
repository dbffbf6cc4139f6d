"""The pass over whole rows reads prompts for the engine, but not all of them."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from research.data.metric_sums import Ratio
from research.engine.requests import Request
from research.evaluate.measuring import row_losses
from research.evaluate.measuring.prompt_keys import DEVICE_SHARE, PromptKeys
from research.models.architecture import RopeScaling

PROMPTS = {"r1": (5, 6, 7), "r2": (5, 6), "r3": (9, 8, 7, 6)}
TOKEN = 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 2  # bytes in bfloat16


def planned(known=(), room=1e9, architecture=TINY):
    config = types.SimpleNamespace(
        model=types.SimpleNamespace(dtype="bfloat16"),
        data=types.SimpleNamespace(rows_per_pass=4, seq_len=16),
    )
    base = types.SimpleNamespace(architecture=architecture)
    run = types.SimpleNamespace(base=base, config=config)
    models = [types.SimpleNamespace(name=name, run=run) for name in ("base", "tuned")]
    requests = {row: Request(prompt) for row, prompt in PROMPTS.items()}
    of_models = {x.name: requests for x in models}
    return PromptKeys.planned(of_models, models, dict.fromkeys(known), room)


def keys(tokens):
    shape = (TINY.layers, tokens, TINY.kv_heads, TINY.head_dim)
    return jnp.arange(np.prod(shape), dtype=jnp.bfloat16).reshape(shape)


def test_what_has_room_does_not_depend_on_what_is_known():
    assert len(planned().prompts) == 6
    assert planned().prompts["base", "r3"] == (9, 8, 7)
    some = planned(room=12 * TOKEN).prompts.keys()
    assert some == {("base", row) for row in PROMPTS} | {("tuned", "r1")}
    known = ("base", "r1"), ("base", "r2")
    assert planned(known, 12 * TOKEN).prompts.keys() == some - {*known}


def test_keys_that_depend_on_the_length_of_their_row_are_not_handed_over():
    scaling = RopeScaling(kind="longrope", original_max_position=8)
    turned = dataclasses.replace(TINY, rope_scaling=scaling)
    assert planned(architecture=turned).prompts == {}


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ((9, 8, 7, 1, 2), 3),
        ((9, 8, 7), 3),
        ((9, 8, 1, 7), 2),
        ((9, 8), 2),
        ((8, 9, 7), 0),
    ],
)
def test_the_part_of_a_prompt_that_its_row_begins_with_is_kept(ids, kept):
    plan, key = planned(), ("base", "r3")
    k, v = (np.asarray(x) for x in (keys(len(ids)), -keys(len(ids))))
    assert plan.wants("base") and not plan.wants("another")
    assert plan.lacks(key, ids) == (kept > 0), "no pass over such a row would give it"
    plan.take(("another", "r3"), np.array(ids), k, v)
    plan.take(key, np.array(ids), k, v)
    assert [*plan.found] == [key] * (kept > 0) and not plan.lacks(key, ids)
    if kept:
        for found, given in ((plan.found[key].k, k), (plan.found[key].v, v)):
            np.testing.assert_array_equal(found[:, 0].swapaxes(1, 2), given[:, :kept])
            assert not np.shares_memory(found, given), "the whole batch stays otherwise"


def test_batches_of_which_nothing_is_missing_are_not_measured_again(monkeypatch):
    rows = [[4, 0], [1], [3], [2]]
    made = []

    def measure(opened, batches, count, width, take, taken):
        assert (count, width) == (2, 4), "the program is the same"
        for part in batches:
            made.append(part)
            loss = np.array([*itertools.chain(*part), 0.0])[:width]
            yield {x: {"loss": Ratio(loss, loss + 1)} for x in ("base", "tuned")}

    packed = types.SimpleNamespace(rows=rows, only=lambda documents, seed: packed)
    monkeypatch.setattr(row_losses, "_rows_per_pass", lambda *_: 2)
    monkeypatch.setattr(row_losses.meshes, "local_rows", lambda *_: range(2))
    monkeypatch.setattr(row_losses, "_numbered", lambda chosen, part, mine: part)
    monkeypatch.setattr(row_losses, "_measure", measure)
    opened = types.SimpleNamespace(mesh=None)
    found = row_losses.measure_rows(opened, packed, np.arange(5), 0, "")
    model, number, sums = next(found)
    assert (model, number, sums) == ("base", 4, {"loss": [4.0, 5.0]})
    assert made == [rows[:2]], "each is known before the next is measured"
    assert len([*found]) == 2 * 5 - 1 and made == [rows[:2], rows[2:]]
    del made[:]
    again = row_losses.measure_rows(
        opened, packed, np.arange(5), 0, "", None, {4, 0, 1}
    )
    assert {number for _, number, _ in again} == {2, 3} and made == [rows[2:]]
    one = row_losses.measure_rows(opened, packed, np.arange(5), 0, "", None, {4, 0})
    assert {number for _, number, _ in one} == {*range(5)}


@pytest.mark.parametrize("share", [None, 1.0, 0.99])
def test_keys_leave_a_device_its_memory(monkeypatch, share):
    """Two batches of each of two models that are read together."""
    rows = -(-4 // jax.device_count()) * jax.device_count()
    limit = 2 * 2 * rows * 16 * TOKEN / DEVICE_SHARE
    stats = None if share is None else {"bytes_limit": limit * share}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert len(planned().prompts) == (0 if share == 0.99 else 6)
