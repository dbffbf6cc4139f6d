"""A position sees what it may see, however the result is computed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, close, in_soak

from research.core.errors import UserError
from research.models.architecture import Rope, RopeScaling
from research.models.attention_kernels import packed_attention
from research.models.parts.rotary import rope_frequencies
from research.models.transformer import Model

DOCUMENTS = (6, 9, 5)  # and four positions of padding
SEGMENTS = np.repeat([1, 2, 3, 0], [*DOCUMENTS, 4])[None]
POSITIONS = np.concatenate([np.arange(n) for n in (*DOCUMENTS, 4)])[None]
TOKENS = np.random.default_rng(0).permutation(TINY.vocab)[None, :24]


def in_blocks(block):
    def attend(q, k, v, segments):
        return packed_attention(q, k, v, segments, segments, kernel="xla", block=block)

    return attend


def hidden_of(model):
    return jax.jit(lambda params, *packed: model.hidden(params, *packed))


@pytest.fixture(scope="module")
def blocked(model):
    """Blocks of 7 divide nothing here: edges of blocks and documents all differ."""
    return model.with_options(attend=in_blocks(7))


@pytest.fixture(scope="module")
def hidden(blocked):
    return hidden_of(blocked)


def test_a_position_sees_all_before_it_in_its_document_and_nothing_else(
    blocked, params
):
    """By gradient: each token is another row of the table, so rows tell positions."""
    probe = jnp.float32(np.random.default_rng(1).normal(size=TINY.embed))

    @jax.jit
    def influences(params):
        def outputs(table):
            leaves = params | {"embedding.table": table}
            hidden = blocked.hidden(leaves, TOKENS, POSITIONS, SEGMENTS)
            return hidden[0] @ probe

        rows = jax.jacrev(outputs)(params["embedding.table"])
        return jnp.abs(rows[:, TOKENS[0]]).max(-1)

    sees = np.array(influences(params)) != 0
    order = np.tri(24, dtype=bool)
    same_document = SEGMENTS[0][:, None] == SEGMENTS[0][None, :]
    np.testing.assert_array_equal(sees, order & same_document)


def test_changing_one_document_leaves_the_others_bit_equal(hidden, params):
    changed = np.where(SEGMENTS == 2, (TOKENS + 1) % TINY.vocab, TOKENS)
    before = hidden(params, TOKENS, POSITIONS, SEGMENTS)
    after = hidden(params, changed, POSITIONS, SEGMENTS)
    others = SEGMENTS != 2
    assert (before[others] == after[others]).all()
    assert (np.abs(before - after).max(-1)[~others] > 1e-3).all()


def test_packed_equals_unpacked(hidden, params):
    packed = hidden(params, TOKENS, POSITIONS, SEGMENTS)[0]
    start = 0
    for length in DOCUMENTS:
        alone = np.zeros((1, 24), np.int32)
        alone[:, :length] = TOKENS[:, start : start + length]
        here = (np.arange(24) < length)[None].astype(np.int32)
        found = hidden(params, alone, np.arange(24)[None], here)[0]
        close(found[:length], packed[start : start + length])
        start += length


def test_only_distances_between_positions_count(hidden, params):
    moved = hidden(params, TOKENS, POSITIONS + 5, SEGMENTS)
    close(moved, hidden(params, TOKENS, POSITIONS, SEGMENTS), rtol=1e-4)
    stretched = hidden(params, TOKENS, POSITIONS * 2, SEGMENTS)
    assert np.abs(stretched - moved).max() > 1e-2


@pytest.mark.parametrize("block", [5, in_soak(100)])
def test_attention_block_does_not_change_results(model, hidden, params, block):
    found = hidden_of(model.with_options(attend=in_blocks(block)))
    expected = hidden(params, TOKENS, POSITIONS, SEGMENTS)
    close(found(params, TOKENS, POSITIONS, SEGMENTS), expected)


def plain_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """All scores at once, keys repeated for their queries: nothing to get wrong."""
    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKH))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k) / q_BTNH.shape[-1] ** 0.5
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    seen = (same & np.tri(same.shape[1], dtype=bool)[None])[:, None]
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, where=seen), v)


@pytest.mark.parametrize("block", [5, in_soak(24), in_soak(100)])
def test_attention_and_its_own_gradient_are_the_plain_ones(block):
    rng = np.random.default_rng(3)
    q, k, v, probe = (
        jnp.float32(rng.normal(size=(2, 24, heads, 10))) for heads in (8, 4, 4, 8)
    )
    segments = jnp.array(np.concatenate([SEGMENTS, np.ones_like(SEGMENTS)]))

    @jax.jit
    def outputs_and_gradients(q, k, v, segments, probe):
        found = []
        for attention in (in_blocks(block), plain_attention):
            outputs, backward = jax.vjp(
                lambda *x, f=attention: f(*x, segments), q, k, v
            )
            found.append((outputs, *backward(probe)))
        return found

    blocked, plain = outputs_and_gradients(q, k, v, segments, probe)
    for actual, expected in zip(blocked, plain, strict=True):
        close(actual, expected)


def scored(model):
    """Some scalar of the output, to differentiate."""

    def score(params):
        return jnp.sum(jnp.sin(model.hidden(params, TOKENS, POSITIONS, SEGMENTS)))

    return score


@pytest.fixture(scope="module")
def value_and_gradient(model, params):
    return jax.jit(jax.value_and_grad(scored(model)))(params)


@pytest.mark.parametrize(
    "options",
    [in_soak(x) for x in ({"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2})],
    ids=["full", "dots", "unrolled"],
)
def test_remat_and_unrolling_do_not_change_results(
    model, params, value_and_gradient, options
):
    other = scored(model.with_options(**options))
    value, gradient = jax.jit(jax.value_and_grad(other))(params)
    close(value, value_and_gradient[0])
    for path, expected in value_and_gradient[1].items():
        close(gradient[path], expected, rtol=1e-4)


def test_each_remat_policy_keeps_less_than_the_one_before(model, params):
    kept = {}
    for policy in ("none", "dots", "full"):
        score = scored(model.with_options(remat=policy))
        backward = jax.eval_shape(lambda p, f=score: jax.vjp(f, p)[1], params)
        kept[policy] = sum(math.prod(x.shape) for x in jax.tree.leaves(backward))
    assert kept["none"] > kept["dots"] > kept["full"]


def test_cached_decode_equals_the_full_forward(model, params):
    rows = np.random.default_rng(2).integers(0, TINY.vocab, (3, 12))
    at = np.broadcast_to(np.arange(12), rows.shape)
    full = hidden_of(model)(params, rows, at, np.ones_like(rows))
    decode = jax.jit(model.decode)
    cache, start = model.init_cache(3, 16), 0
    for length in (4, 1, 1, 4, 1, 1):
        part = rows[:, start : start + length]
        found, cache = decode(params, part, cache)
        close(found, full[:, start : start + length])
        start += length
    assert [*cache.length] == [start] * 3 == [12] * 3


def test_the_model_is_traced_once(model, params):
    traces = []

    @jax.jit
    def run(params, *packed):
        traces.append(1)
        return model.hidden(params, *packed)

    other = {path: np.zeros(x.shape, x.dtype) for path, x in params.items()}
    run.trace(params, TOKENS, POSITIONS, SEGMENTS)
    run.trace(other, TOKENS + 1, POSITIONS, SEGMENTS)
    assert len(traces) == 1


def test_compute_dtype_is_the_dtype_of_the_output(model, params):
    half = model.with_options(dtype=jnp.bfloat16)
    shape = jax.eval_shape(half.hidden, params, TOKENS, POSITIONS, SEGMENTS)
    assert shape.dtype == jnp.bfloat16 and shape.shape == (1, 24, TINY.embed)


def test_each_rope_scaling_is_what_its_paper_says():
    def frequencies(**scaling):
        return np.array(rope_frequencies(Rope(5e5, RopeScaling(**scaling)), 64))

    plain = frequencies()
    np.testing.assert_allclose(plain, 5e5 ** -(np.arange(32) / 32), rtol=1e-5)
    np.testing.assert_allclose(
        frequencies(kind="linear", factor=4.0), plain / 4, rtol=1e-6
    )
    scaled = frequencies(kind="llama3", factor=8.0, original_max_position=8192)
    turns = 8192 * plain / (2 * np.pi)
    blended = (turns > 1) & (turns < 4)
    assert 0 < blended.sum() < 16
    np.testing.assert_allclose(scaled[turns >= 4], plain[turns >= 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 8, rtol=1e-6)
    between = scaled[blended] / plain[blended]
    assert (between > 1 / 8).all() and (between < 1).all()


def test_parameters_that_do_not_fit_are_named(model, params):
    short = {path: leaf for path, leaf in params.items() if path != "head.kernel"}
    with pytest.raises(ValueError, match=r"differ in: head\.kernel$"):
        model.hidden(short, TOKENS, POSITIONS, SEGMENTS)


def test_random_parameters_have_their_specs(model):
    # The default generator takes ten seconds to compile for twelve shapes.
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"))
    assert list(params) == list(model.specs)
    for path, spec in model.specs.items():
        value = np.array(params[path])
        assert value.shape == spec.shape and value.dtype == np.float32, path
        expected = spec.std if spec.n_in else 0.0
        np.testing.assert_allclose(value.std(), expected, rtol=0.1, err_msg=path)
        assert not spec.n_in or not spec.stacked or (value[0] != value[1]).all(), path


def test_heads_that_cannot_share_keys_are_refused():
    with pytest.raises(UserError, match="3 key/value heads"):
        dataclasses.replace(TINY, kv_heads=3)


def test_only_an_untied_model_has_a_head(model):
    tied = Model(dataclasses.replace(TINY, tied_head=True))
    assert model.specs.keys() - tied.specs.keys() == {"head.kernel"}
