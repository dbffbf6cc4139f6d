"""Logits leave their product in float32, whatever goes into it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, in_soak, random_params

from research.models.cached_attention import attend_cached
from research.models.transformer import Model
from research.tasks.token_loss_and_metrics import cross_entropies
from research.weights.representations.low_rank import LowRank

BF16 = jnp.bfloat16
TOKENS = np.random.default_rng(3).integers(0, TINY.vocab, (2, 12), np.int32)


HEADS = ("untied", "tied", "adapted", "tied, adapted")


@pytest.fixture(scope="module", params=HEADS)
def half(request):
    """See `make_half`, of each head."""
    return make_half(request.param)


def make_half(kind):
    """A bfloat16 model, its parameters, whether it is tied, and its head's factors."""
    tied = kind.startswith("tied")
    model = Model(dataclasses.replace(TINY, tied_head=tied)).with_options(dtype=BF16)
    # Large logits lie further apart in bfloat16: in [16, 32) 0.125.
    params = {path: x.astype(BF16) for path, x in random_params(model.specs).items()}
    [path] = model.head(params)
    params[path] *= 32.0
    factors = None
    if "adapted" in kind:
        rng = np.random.default_rng(5)
        rows, columns = params[path].shape
        a, b = (
            jnp.asarray(rng.normal(size=s), BF16) for s in ((rows, 4), (4, columns))
        )
        factors = a, b
        params[path] = LowRank(params[path], a, b, scale=jnp.float32(2.0))
    return model, params, tied, factors


def exact(hidden, half):
    """In float64, from the very numbers that enter the products."""
    model, params, tied, factors = half
    [weight] = model.head(params).values()
    wide = functools.partial(np.asarray, dtype=np.float64)
    h = wide(hidden)
    if not factors:
        return h @ (wide(weight).T if tied else wide(weight))
    base = wide(weight.base)
    a, b = map(wide, factors)
    first, second = (b.T, a.T) if tied else (a, b)
    # The adapter's middle is an activation, which bfloat16 rounds.
    middle = wide(jnp.asarray(h @ first, BF16) * jnp.asarray(2.0, BF16))
    return h @ (base.T if tied else base) + middle @ second


def random_hidden(*shape):
    """As after the last norm: about one in size."""
    return jnp.asarray(np.random.default_rng(11).normal(size=shape), BF16)


def check(logits, hidden, half):
    assert logits.dtype == jnp.float32 and hidden.dtype == BF16
    expected = exact(hidden, half)
    scale = np.abs(expected).max()
    assert scale > 16
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * scale)
    rounded = np.asarray(logits.astype(BF16), np.float64)
    assert (rounded != np.asarray(logits)).mean() > 0.9, "not rounded on the way"


def test_logits_of_hidden_states_are_the_float32_product(half):
    model, params, *_ = half
    hidden = random_hidden(2, 12, TINY.embed)
    logits = jax.jit(model.logits)(params, hidden)
    check(logits, hidden, half)
    # `head` holds all that `logits` reads: the loss gives it nothing else.
    alone = jax.jit(model.logits)(model.head(params), hidden)
    np.testing.assert_array_equal(alone, logits)


@pytest.mark.parametrize("kind", ["tied, adapted", *map(in_soak, HEADS[:-1])])
def test_decoding_gives_the_float32_product_too(kind):
    """A prompt, and one token after it."""
    half = model, params, *_ = make_half(kind)
    cache = model.init_cache(2, 16)

    @jax.jit
    def advance(params, tokens, cache):
        hidden, cache = model.decode(params, tokens, cache)
        return hidden[:, -1], model.logits(params, hidden[:, -1]), cache

    hidden, logits, cache = advance(params, TOKENS, cache)
    check(logits, hidden, half)
    hidden, logits, _ = advance(params, np.argmax(logits, -1)[:, None], cache)
    check(logits, hidden, half)


def test_the_loss_is_of_unrounded_logits(half):
    model, params, *_ = half
    rng = np.random.default_rng(7)
    hidden = random_hidden(20, TINY.embed)
    targets = rng.integers(0, TINY.vocab, 20)
    losses = jax.jit(lambda *x: cross_entropies(model.logits(*x[:2]), x[2]))(
        model.head(params), hidden, targets
    )
    logits = exact(hidden, half)
    top = logits.max(-1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    expected = normalizer - logits[np.arange(20), targets]
    np.testing.assert_allclose(
        losses, expected, rtol=0, atol=2e-6 * np.abs(logits).max()
    )


def test_decoding_attends_by_unrounded_scores():
    """Two keys whose scores of about 100 differ by less than bfloat16 can tell."""
    q = jnp.ones((1, 1, 1, 64), BF16) * 8
    keys = np.full((2, 1, 1, 1, 64), 1.5)
    keys[1, ..., :8] += 2.0**-7
    k, v = jnp.asarray(keys, BF16), jnp.asarray([0.0, 1.0], BF16)
    v = jnp.broadcast_to(v[:, None, None, None, None], keys.shape)
    held = (jnp.zeros((1, 1, 1, 4, 64), BF16).at[:, :, :, 0].set(x[0]) for x in (k, v))
    at = (np.int32(0), np.int32(0), np.array([1]))
    mixed, *_ = attend_cached(q, k[1], v[1], *held, *at)
    gap = 8 * 64**-0.5 * 8 * 2.0**-7
    expected = 1 / (1 + np.exp(-gap))
    assert 0.51 < expected < 0.53
    np.testing.assert_allclose(np.float32(mixed), expected, atol=2e-3)
