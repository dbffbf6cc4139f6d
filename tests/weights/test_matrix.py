"""A `LowRank` behaves as the array it stands for, in every way a model uses one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.parameter_spec import Spec
from research.weights.representations.low_rank import LowRank


def low_rank(shape, n_in=1, stack=(), rank=3, seed=0, **changes):
    rng = np.random.default_rng(seed)

    def normal(*size):
        return jnp.float32(rng.normal(size=size))

    return LowRank(
        base=normal(*stack, *shape),
        a=normal(*stack, *shape[:n_in], rank),
        b=normal(*stack, rank, *shape[n_in:]),
        scale=jnp.float32(rng.uniform(0.5, 2.0, stack)),
        **changes,
    )


def inputs(*shape):
    return jnp.float32(np.random.default_rng(9).normal(size=shape))


@pytest.mark.parametrize(
    "shape, n_in", [((7, 5), 1), ((7, 4, 5), 1), ((4, 5, 7), 2)], ids=str
)
def test_contract_of_factors_is_contract_of_the_whole(shape, n_in):
    w = low_rank(shape, n_in)
    x = inputs(2, 6, *shape[:n_in])
    close(contract(x, w, n_in), np.tensordot(x, materialize(w), n_in))


USES = {
    "contract": lambda w: contract(inputs(2, 6, 7), w),
    "two axes in": lambda w: contract(inputs(2, 4, 5), w, 2),
    "lookup": lambda w: lookup(w, jnp.array([[0, 3], [3, 6]]), jnp.float32),
    "transposed": lambda w: contract(inputs(2, 5), transpose(w)),
}


@pytest.mark.parametrize("use", USES)
def test_gradient_of_factors_is_that_through_the_whole(use):
    """The whole is formed in one of them only: the chain rule makes them agree."""
    w = low_rank((4, 5, 7), 2) if use == "two axes in" else low_rank((7, 5))

    @jax.jit
    def gradients(w):
        def score(w, form):
            return jnp.sum(jnp.sin(USES[use](form(w))))

        of_factors = jax.grad(score)(w, lambda w: w)
        through_whole = jax.grad(score)(w, materialize)
        return [(g.a, g.b) for g in (of_factors, through_whole)]

    found, expected = gradients(w)
    assert all(np.abs(x).max() > 0 for x in expected)
    close(found, expected)


def test_materialize_is_base_plus_scaled_product():
    w = low_rank((7, 4, 5), stack=(3,))
    product = np.einsum("lir,lrno->lino", w.a, w.b) * w.scale[:, None, None, None]
    close(materialize(w), w.base + product)
    half = dataclasses.replace(w, base=w.base.astype(jnp.bfloat16))
    assert materialize(half).dtype == jnp.bfloat16


def test_lookup_is_contract_of_one_hot_rows():
    w = low_rank((11, 5))
    ids = jnp.array([[0, 10, 3], [3, 3, 7]])
    close(lookup(w, ids, jnp.float32), contract(jax.nn.one_hot(ids, 11), w))


@pytest.mark.parametrize("kind", ["array", "factors"])
def test_transpose_swaps_input_and_output(kind):
    w = low_rank((11, 5)) if kind == "factors" else low_rank((11, 5)).base
    whole = np.array(materialize(w))
    close(contract(inputs(2, 5), transpose(w)), inputs(2, 5) @ whole.T)
    close(materialize(transpose(w)), whole.T)
    close(contract(inputs(2, 11), transpose(transpose(w))), inputs(2, 11) @ whole)
    assert transpose(w).shape == whole.T.shape
    ids = jnp.array([[0, 4], [4, 1]])
    close(lookup(transpose(w), ids, jnp.float32), whole.T[ids])


def test_weights_are_cast_and_activations_are_not():
    w = low_rank((7, 5))
    assert contract(inputs(2, 7).astype(jnp.bfloat16), w).dtype == jnp.bfloat16
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), w)
    assert contract(inputs(2, 7), half).dtype == jnp.float32
    assert lookup(w, jnp.array([1]), jnp.bfloat16).dtype == jnp.bfloat16


def test_scan_over_a_stack_visits_each_layer():
    w = low_rank((7, 7), stack=(3,))
    scanned, _ = jax.lax.scan(lambda x, w: (contract(x, w), None), inputs(2, 7), w)
    looped = inputs(2, 7)
    for layer in materialize(w):
        looped = looped @ layer
    close(scanned, looped)


def test_dropout_acts_only_with_a_key_and_only_on_the_adapter():
    x, w = inputs(4, 7), low_rank((7, 5), rate=0.5)
    keyed = dataclasses.replace(w, key=jax.random.key(0))
    other = dataclasses.replace(w, key=jax.random.key(1))
    close(contract(x, w), x @ materialize(w))
    assert not np.allclose(contract(x, keyed), contract(x, w), atol=1e-2)
    assert not np.allclose(contract(x, keyed), contract(x, other), atol=1e-2)
    silent = dataclasses.replace(keyed, b=jnp.zeros_like(w.b))
    assert (contract(x, silent) == x @ w.base).all()


def test_dropout_keeps_the_mean():
    x, w = inputs(2, 7), low_rank((7, 5), rate=0.25)
    keys = jax.random.split(jax.random.key(0), 4000)
    dropped = jax.vmap(lambda key: contract(x, dataclasses.replace(w, key=key)))(keys)
    # About five standard errors of the mean of 4000 draws.
    tolerance = 5 * np.std(dropped, axis=0) / 4000**0.5
    assert (np.abs(np.mean(dropped, axis=0) - contract(x, w)) < tolerance).all()
    assert np.std(dropped, axis=0).min() > 0.1


def test_a_kernel_as_a_matrix_keeps_stack_values_and_split():
    spec = Spec((2, 40, 8, 10), ("layers", "embed", "heads", "head_dim"), stacked=1)
    assert spec.as_matrix.shape == (2, 40, 80)
    assert spec.as_matrix.axes == ("layers", "embed", "heads")
    out = Spec((8, 10, 40), ("heads", "head_dim", "embed"), n_in=2)
    assert (out.as_matrix.shape, out.as_matrix.axes) == ((80, 40), ("heads", "embed"))
    norm = Spec((40,), ("norm",), n_in=0)
    assert norm.as_matrix is norm
