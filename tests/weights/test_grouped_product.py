"""Each row times the matrix of its group, whatever the kernel and the sizes."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from research.config.choices import EXPERT_KERNELS
from research.weights.contraction import contract_groups, materialize
from research.weights.parameter_spec import Spec
from research.weights.quantized.int8_weights import as_int8
from research.weights.representations.grouped_product import KERNELS, Groups
from research.weights.representations.low_rank import LowRank
from research.weights.representations.transposed import Transposed

INPUTS, OUTPUTS = 6, 5
# No row at all, matrices without rows, groups longer than a block, rows behind the end.
SIZES = {
    "even": (4, 4, 4, 4),
    "some empty": (0, 11, 0, 2),
    "one has all": (0, 0, 16, 0),
    "none": (0, 0, 0, 0),
}


def grouped(sizes, kernel="blocked", block=4, rows=16):
    owners = np.repeat(np.arange(len(sizes) + 1), [*sizes, rows - sum(sizes)])
    return Groups(
        sizes=jnp.array(sizes, jnp.int32),
        owners=jnp.array(owners, jnp.int32),
        origins=jnp.arange(rows, dtype=jnp.int32) % 3,
        kernel=kernel,
        block=block,
    )


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape)


X, W = normal(16, INPUTS), normal(4, INPUTS, OUTPUTS)


def one_by_one(x, w, groups):
    """The definition, with a row of zeros for a row without a matrix."""
    w = jnp.concatenate([w, jnp.zeros_like(w[:1])])
    return jnp.einsum("mi,mio->mo", x, w[groups.owners], precision="highest")


def with_gradients(product, groups):
    """The result, and the gradients of rows and matrices for the same cotangent."""

    @jax.jit
    def run(x, w):
        y, back = jax.vjp(lambda x, w: product(x, w, groups), x, w)
        return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The optional package has the signature of JAX's own function."""
    package = types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot)
    monkeypatch.setitem(sys.modules, "tokamax", package)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot"])
def test_every_kernel_gives_each_row_its_own_matrix(kernel, sizes):
    groups = grouped(sizes, kernel)
    expected = with_gradients(one_by_one, groups)(X, W)
    close(with_gradients(contract_groups, groups)(X, W), expected)


@pytest.mark.parametrize("block", [1, 3, 16, 100])
def test_the_block_changes_nothing(block):
    groups = grouped((5, 0, 7, 1), block=block)
    expected = with_gradients(one_by_one, groups)(X, W)
    close(with_gradients(contract_groups, groups)(X, W), expected)


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
def test_matrices_with_outputs_first(kernel):
    groups = grouped((5, 0, 7, 1), kernel)

    def flipped(x, w, groups):
        return contract_groups(x, Transposed(w.swapaxes(1, 2)), groups)

    expected = with_gradients(one_by_one, groups)(X, W)
    close(with_gradients(flipped, groups)(X, W), expected)


def test_a_row_without_a_matrix_may_hold_anything():
    """Its products are zero, and it reaches no gradient."""
    groups = grouped((4, 0, 5, 1))
    odd = X.at[10:].set(jnp.nan)
    found = with_gradients(contract_groups, groups)(odd, W)
    assert np.isfinite(found[0]).all() and not np.asarray(found[0][10:]).any()
    close(found[2], with_gradients(one_by_one, groups)(X, W)[2])


def test_frozen_matrices_get_no_gradient_and_keep_no_rows():
    groups = grouped((4, 4, 4, 4))
    _, back = jax.vjp(lambda x: contract_groups(x, W, groups), X)
    kept = [leaf.shape for leaf in jax.tree.leaves(back)]
    assert X.shape not in kept and W.shape in kept


def test_no_kernel_is_as_large_as_rows_times_matrices():
    """`blocked` holds no array of the size of a dense product with every matrix."""
    rows, matrices = 64, 32
    x, w = normal(rows, INPUTS), normal(matrices, INPUTS, OUTPUTS)
    groups = grouped((2,) * matrices, rows=rows)
    jaxpr = jax.make_jaxpr(with_gradients(contract_groups, groups))(x, w)
    assert max(sizes_in(jaxpr.jaxpr)) <= max(x.size, w.size, rows * OUTPUTS)


def sizes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.tree.leaves(equation.params):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_low_rank_updates_are_those_of_each_rows_matrix():
    groups = grouped((5, 0, 7, 1))
    leaf = LowRank(
        W, normal(4, INPUTS, 2), normal(4, 2, OUTPUTS), jnp.array([2.0, 1.0, 0.5, 3.0])
    )
    found = jax.jit(contract_groups)(X, leaf, groups)
    close(found, one_by_one(X, materialize(leaf), groups))


def test_dropout_drops_inputs_of_adapters_alone():
    groups = grouped((5, 0, 7, 1))
    factors = normal(4, INPUTS, 2), normal(4, 2, OUTPUTS)
    keys, rates = jax.random.split(jax.random.key(1), 4), jnp.full(4, 0.5)
    leaf = LowRank(W, *factors, jnp.ones(4), keys, rates)
    base = one_by_one(X, W, groups)
    dropped = contract_groups(X, leaf, groups) - base
    whole = contract_groups(X, dataclasses.replace(leaf, key=None), groups) - base
    assert np.abs(dropped - whole).max() > 0.1
    assert not np.asarray(dropped[13:]).any()


def test_bytes_with_one_scale_for_each_output_of_each_matrix():
    groups = grouped((5, 0, 7, 1))
    spec = Spec(W.shape, ("expert", "embed", "mlp"), stacked=1)
    leaf = as_int8(W, spec)
    found = jax.jit(contract_groups)(X, leaf, groups)
    close(found, one_by_one(X, materialize(leaf), groups))


def test_each_kernel_has_its_products():
    assert {*KERNELS} == {*EXPERT_KERNELS}
