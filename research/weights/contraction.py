"""The only ways in which a model uses its weights.

A weight is a plain array or a `Leaf`: a small pytree that knows how to be contracted.
A model multiplies only through these functions, so a transform such as LoRA changes
what a model computes by swapping leaves of its parameters, and the model file never
mentions the transform. `jit`, `scan`, `remat`, `vmap` and sharding work on the result
because leaves are pytrees.
"""

from typing import Any

import jax
import jax.numpy as jnp

from research.weights.quantized.quantized_matrix import QuantizedMatrix
from research.weights.representations.grouped_product import Groups, multiply_groups
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.plain_array import multiply
from research.weights.representations.transposed import Transposed

Array = jax.Array


def contract(
    x: Array, w: Matrix, n_in: int = 1, dtype: jnp.dtype | None = None
) -> Array:
    """Sums the last `n_in` axes of `x` with the first `n_in` of `w`.

    Args:
      x: `[*batch, *in]`.
      w: `[*in, *out]`, an array or a `Leaf` without stacking axes.
      n_in: the number of summed axes.
      dtype: of the result; by default that of `x`. A wider one is the dtype in which
        the product accumulates, so the result is not rounded to `x.dtype` on the way.

    Returns:
      `[*batch, *out]` in `dtype`. Weights are cast to `x.dtype`, never activations.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, Leaf):
        return w.contract(x, n_in, dtype)
    return multiply(x, w, n_in, False, dtype)


def contract_groups(
    x: Array, w: Matrix, groups: Groups, dtype: jnp.dtype | None = None
) -> Array:
    """Each row of `x` times the one of several stacked matrices that is its own.

    Args:
      x: `[rows, in]`, sorted by matrix.
      w: `[matrices, in, out]`, an array or a `Leaf` with this one stacking axis.
      groups: the matrix of each row.
      dtype: of the result; by default that of `x`.

    Returns:
      `[rows, out]`, zero in rows without a matrix. Weights are cast to `x.dtype`.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, Leaf):
        return w.contract_groups(x, groups, dtype)
    return multiply_groups(x, w, groups, False, dtype)


def lookup(w: Matrix, ids: Array, dtype: jnp.dtype) -> Array:
    """Rows `ids` of a `[vocabulary, *out]` matrix, cast to `dtype`.

    Equal to contracting one-hot rows with `w`.
    """
    if isinstance(w, Leaf):
        return w.lookup(ids, dtype)
    return jnp.take(w, ids, axis=0).astype(dtype)


def transpose(w: Matrix) -> Matrix:
    """A two-axis matrix with input and output swapped (a tied vocabulary head)."""
    return w.transpose() if isinstance(w, Leaf) else Transposed(w)


def expand(params: Any, dtype: jnp.dtype) -> Any:
    """`params` with arrays in the place of codes, for a loop that multiplies often.

    Codes become an array in each product. A caller that multiplies with one matrix many
    times, such as the loss with the vocabulary head, has it made once.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedMatrix):
            return leaf
        whole = leaf.decode(dtype)
        return Transposed(whole) if leaf.flipped else whole

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, QuantizedMatrix))


def materialize(w: Matrix) -> Array:
    """`w` as one array. Stacking axes of a `Leaf` come first, as in its arrays."""
    return w.materialize() if isinstance(w, Leaf) else w
