"""Products of sorted rows with one matrix out of many, as experts need them.

Letters of shapes: M rows, E matrices, I inputs and O outputs of a matrix. The cost is
that of M rows, whatever E is; `blocked` adds a quarter of a block for each matrix.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.core.errors import look_up

Array = jax.Array
# By this name a policy of rematerialisation keeps the products.
GROUPED_PRODUCT = "grouped product"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Which of E matrices each of M rows is multiplied with; rows lie sorted by it.

    Attributes:
      sizes: int32 `[E]`, how many rows each matrix has. Rows behind the last group
        have no matrix: their products are zero.
      owners: int32 `[M]`, the matrix of each row; E or more for a row without one.
      origins: int32 `[M]`, the row of the batch from which each row comes.
      kernel: one of `config.choices.EXPERT_KERNELS`.
      block: rows that `blocked` multiplies at a time; a half and quarters of it for
        those left over.
    """

    sizes: Array
    owners: Array
    origins: Array
    kernel: str = dataclasses.field(default="blocked", metadata={"static": True})
    block: int = dataclasses.field(default=64, metadata={"static": True})


def multiply_groups(
    x_MI: Array, w_EIO: Array, groups: Groups, flipped: bool, dtype: jnp.dtype
) -> Array:
    """Each row times the matrix of its group: `[M, O]`, accumulated in `dtype`.

    Args:
      x_MI: rows, sorted by matrix.
      w_EIO: the matrices; `[E, O, I]` where `flipped`. They are cast to `x_MI.dtype`.
      groups: the matrix of each row.
      flipped: outputs come first in each matrix.
      dtype: of the result.
    """
    y_MO = _multiply(x_MI, w_EIO, groups, flipped, dtype)
    return checkpoint_name(y_MO, GROUPED_PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _multiply(x, w, groups, flipped, dtype):
    return _product(x, w, groups, flipped, dtype)


def _product(x, w, groups, flipped, dtype):
    product, _ = look_up(KERNELS, groups.kernel, "the kernel of experts")
    return product(x, w, groups, flipped, dtype)


def _forward(x, w, groups, flipped, dtype):
    values = jax.tree.map(lambda leaf: leaf.value, groups, is_leaf=_is_primal)
    y = _product(x.value, w.value, values, flipped, dtype)
    # A frozen weight gets no gradient, so its input is not kept.
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    like = jnp.zeros(0, x.value.dtype), jnp.zeros(0, w.value.dtype)
    return y, (*kept, *like, values)


def _backward(flipped, dtype, kept, d_y):
    x, w, like_x, like_w, groups = kept
    d_y = d_y.astype(like_x.dtype)
    d_x = d_w = None
    if w is not None:
        d_x = _product(d_y, w, groups, not flipped, like_x.dtype)
    if x is not None:
        _, outer = look_up(KERNELS, groups.kernel, "the kernel of experts")
        d_w = outer(*((d_y, x) if flipped else (x, d_y)), groups, like_w.dtype)
    return d_x, d_w, None


_multiply.defvjp(_forward, _backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _each_matrix(
    groups: Groups, rows: int, block: int, body: Callable[..., Any], carry: Any
) -> Any:
    """Folds `body(carry, number, blocks)` over the matrices that have rows.

    `blocks(visit, carry)` folds `visit(carry, first, length, mine)` over the blocks of
    rows of that matrix: those of `block` rows, then one of a half, and the rest in
    quarters. See `_each_block`; `mine` is None where a block has no row of another.
    """
    ends = jnp.cumsum(groups.sizes)
    busy = jnp.argsort(groups.sizes == 0, stable=True)

    def matrix(n: Array, carry: Any) -> Any:
        number = busy[n]
        size, end = groups.sizes[number], ends[number]

        def blocks(visit: Callable[..., Any], inner: Any) -> Any:
            begin = end - size
            *full, least = sorted({max(1, block // n) for n in (1, 2, 4)}, reverse=True)
            for length in full:
                inner = _each_full_block(begin, end, length, visit, inner)
                begin = end - (end - begin) % length
            return _each_block(begin, end, least, rows, visit, inner)

        return body(carry, number, blocks)

    return jax.lax.fori_loop(0, jnp.sum(groups.sizes > 0), matrix, carry)


def _each_full_block(
    begin: Array, end: Array, block: int, visit: Callable[..., Any], carry: Any
) -> Any:
    """As `_each_block`, over those that have all their rows."""

    def one(i: Array, carry: Any) -> Any:
        return visit(carry, begin + i * block, block, None)

    return jax.lax.fori_loop(0, (end - begin) // block, one, carry)


def _each_block(
    begin: Array,
    end: Array,
    block: int,
    rows: int,
    visit: Callable[..., Any],
    carry: Any,
) -> Any:
    """Folds `visit(carry, first, block, mine)` over blocks of rows `begin` to `end`.

    `first` is the first row of a block, and `mine` a mask `[block, 1]` of those between
    `begin` and `end`. The last block overlaps the rows behind, or those before if none
    follow.
    """

    def one(i: Array, carry: Any) -> Any:
        start = begin + i * block
        first = jnp.minimum(start, rows - block)
        row = (first + jnp.arange(block))[:, None]
        # A block that was moved back has rows that were visited already.
        return visit(carry, first, block, (row >= start) & (row < end))

    return jax.lax.fori_loop(0, -((begin - end) // block), one, carry)


def _part(x: Array, first: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, block)


def _blocked_product(x, w, groups, flipped, dtype):
    """In plain XLA, block by block."""
    block = min(groups.block, x.shape[0])
    summed = (((1,), (1 if flipped else 0,)), ((), ()))

    def matrix(y, number, blocks):
        # One at a time, a cast costs no pass over all matrices.
        own = jax.lax.dynamic_index_in_dim(w, number, keepdims=False).astype(x.dtype)

        def visit(y, first, length, mine):
            made = jax.lax.dot_general(
                _part(x, first, length), own, summed, preferred_element_type=dtype
            )
            if mine is not None:
                made = jnp.where(mine, made, _part(y, first, length))
            return jax.lax.dynamic_update_slice_in_dim(y, made, first, 0)

        return blocks(visit, y)

    empty = jnp.zeros((x.shape[0], w.shape[1 if flipped else 2]), dtype)
    return _each_matrix(groups, x.shape[0], block, matrix, empty)


def _blocked_outer(x, d_y, groups, dtype):
    """`[E, I, O]`: for each matrix, the sum over its rows of their outer products."""
    block = min(groups.block, x.shape[0])
    shape = x.shape[1], d_y.shape[1]
    summed = (((0, 1), (0, 1)), ((), ()))

    def matrix(d_w, number, blocks):
        def visit(total, first, length, mine):
            # A CPU takes twice as long in bfloat16 where a product sums over one
            # leading axis.
            halves = (2 - length % 2, -1)
            own = _part(x, first, length)
            own = own if mine is None else jnp.where(mine, own, 0)
            return total + jax.lax.dot_general(
                own.reshape(*halves, shape[0]),
                _part(d_y, first, length).reshape(*halves, shape[1]),
                summed,
                preferred_element_type=jnp.float32,
            )

        total = blocks(visit, jnp.zeros(shape, jnp.float32)).astype(dtype)
        return jax.lax.dynamic_update_index_in_dim(d_w, total, number, 0)

    empty = jnp.zeros((groups.sizes.shape[0], *shape), dtype)
    return _each_matrix(groups, x.shape[0], block, matrix, empty)


def _ragged_product(x, w, groups, flipped, dtype):
    """`jax.lax.ragged_dot`, which TPUs and GPUs have a kernel for."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if flipped else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    y = jax.lax.ragged_dot_general(
        x, w.astype(x.dtype), groups.sizes, dims, preferred_element_type=dtype
    )
    return jnp.where((groups.owners < w.shape[0])[:, None], y, 0)


def _ragged_outer(x, d_y, groups, dtype):
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    d_w = jax.lax.ragged_dot_general(
        x, d_y, groups.sizes, dims, preferred_element_type=jnp.float32
    )
    return d_w.astype(dtype)


def _tokamax_product(x, w, groups, flipped, dtype):
    """The kernels of the optional package, the best that it has for the device."""
    import tokamax

    w = w.swapaxes(1, 2) if flipped else w
    y = tokamax.ragged_dot(
        x, w.astype(x.dtype), groups.sizes, preferred_element_type=dtype
    )
    return jnp.where((groups.owners < w.shape[0])[:, None], y, 0)


def _tokamax_outer(x, d_y, groups, dtype):
    shape = groups.sizes.shape[0], x.shape[1], d_y.shape[1]

    def product(w: Array) -> Array:
        return _tokamax_product(x, w, groups, False, d_y.dtype)

    # Linear in the matrices, so their values do not matter, and are never made.
    return jax.vjp(product, jnp.zeros(shape, dtype))[1](d_y)[0]


# The product, and the gradient of the matrices.
KERNELS = {
    "blocked": (_blocked_product, _blocked_outer),
    "ragged_dot": (_ragged_product, _ragged_outer),
    "tokamax": (_tokamax_product, _tokamax_outer),
}
