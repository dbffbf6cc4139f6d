"""Frozen weights in one byte each: a base that adapters train over, or that decodes.

Symmetric, one scale for each output channel: `w = code * scale`, code in [-127, 127].
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.parameter_spec import Spec
from research.weights.quantized.quantized_matrix import (
    QuantizedMatrix,
    is_quantizable,
)
from research.weights.representations.grouped_product import Groups, multiply_groups

Array = jax.Array
LARGEST = 127
SMALLEST = 1e-30  # In place of a scale of 0, by which nothing can be divided.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix(QuantizedMatrix):
    """A matrix as codes and scales.

    Output axes come first, the order in which a CPU multiplies fastest. A table of
    embeddings keeps its order: one scale for each id suits its rows and a tied head.

    Attributes:
      codes: `[*stack, *out, *in]` int8, of a table `[ids, embed]`.
      scale: `[*stack, *out]` float32, of a table `[ids]`.
      n_first: the number of axes that have scales, behind the stack.
      flipped: see `QuantizedMatrix`.
      rounds_inputs: for decoding, which is bound by reading weights: products have the
        codes themselves as weights, and on a CPU inputs of eight bits. Such a matrix
        gives its inputs no gradient.
      multiplies_bytes: for training, see `byte_product`.
    """

    codes: Array
    scale: Array
    n_first: int = dataclasses.field(metadata={"static": True})
    flipped: bool = dataclasses.field(default=True, metadata={"static": True})
    rounds_inputs: bool = dataclasses.field(default=False, metadata={"static": True})
    multiplies_bytes: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def form(self) -> str:
        return "int8"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def stack(self) -> int:
        return len(self.scale.shape) - self.n_first

    @property
    def lead(self) -> int:
        return self.n_first

    def decode(self, dtype: Any) -> Array:
        inner = range(self.scale.ndim, self.codes.ndim)
        return (self.codes * jnp.expand_dims(self.scale, inner)).astype(dtype)

    def decode_rows(self, ids: Array, dtype: Any) -> Array:
        return (self.codes[ids] * self.scale[ids][..., None]).astype(dtype)

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        if self.multiplies_bytes and self.flipped:
            return byte_product(x, self, n_in, dtype)
        if not (self.rounds_inputs and self.flipped):
            return super().contract(x, n_in, dtype)
        batch, inputs = x.shape[: x.ndim - n_in], math.prod(x.shape[x.ndim - n_in :])
        # Products of plain matrices: with more axes a CPU takes twice as long.
        y = jax.lax.platform_dependent(
            x.reshape(*batch, inputs),
            self.codes.reshape(-1, inputs),
            cpu=_multiply_bytes,
            default=lambda x, codes: _dot(x, codes.astype(x.dtype)),
        )
        y = y * jnp.expand_dims(self.scale.reshape(-1), range(y.ndim - 1))
        return y.astype(dtype).reshape(*batch, *self.scale.shape)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        if not (self.rounds_inputs and self.flipped):
            return super().contract_groups(x, groups, dtype)
        y = multiply_groups(x, self.codes, groups, True, jnp.dtype(jnp.float32))
        return (y * self.scale[groups.owners]).astype(dtype)


def int8_specs(spec: Spec) -> Int8Matrix:
    """The `Int8Matrix` of the matrix `spec`, with a `Spec` for each array."""
    stack, ends, is_table = spec.stacked, spec.stacked + spec.n_in, spec.is_table

    def moved(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if is_table:
            return values
        return (*values[:stack], *values[ends:], *values[stack:ends])

    n_first = 1 if is_table else len(spec.shape) - ends
    codes = Spec(moved(spec.shape), moved(spec.axes), 0, stack, dtype="int8")
    own = stack + n_first
    scale = Spec(codes.shape[:own], codes.axes[:own], 0, stack, dtype="float32")
    return Int8Matrix(codes, scale, n_first, not is_table)


def as_int8(weight: Array, spec: Spec) -> Int8Matrix:
    """`weight`, which `spec` describes, rounded to the nearest codes."""
    like = int8_specs(spec)
    first, last = spec.stacked, len(spec.shape)
    if like.flipped:
        into = range(first, first + spec.n_in)
        weight = jnp.moveaxis(weight, into, range(last - spec.n_in, last))
    codes, scale = _rounded(weight, tuple(range(len(like.scale.shape), last)))
    return dataclasses.replace(like, codes=codes, scale=scale)


class Int8Format:
    """The `BaseFormat` of one byte a weight."""

    def specs(self, spec: Spec) -> Spec | Int8Matrix:
        return int8_specs(spec) if is_quantizable(spec) else spec

    def store(self, weight: Array, spec: Spec) -> Array | Int8Matrix:
        return as_int8(weight, spec) if is_quantizable(spec) else weight


FORMAT = Int8Format()


def with_byte_products(params: Any) -> Any:
    """`params` whose matrices in int8 take part in products as `byte_product` has it.

    A table of embeddings does not: rows are read from it, and the loss makes an array
    of a head.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Int8Matrix):
            return leaf
        return dataclasses.replace(leaf, multiplies_bytes=True)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Int8Matrix))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def byte_product(x: Array, w: Int8Matrix, n_in: int, dtype: Any) -> Array:
    """`x` times the codes of `w`, with the inputs of each row in eight bits as well.

    The gradient of the inputs is such a product, too: that of each row is multiplied by
    the scales of the outputs and then rounded to bytes. `w` has no gradient, and
    factors beside it are multiplied as always (SwitchBack: Wortsman et al. 2023,
    arXiv:2304.13013, section 2.2). Sums of bytes are exact up to 133,000 terms, so no
    mesh changes them.

    Args:
      x: `[*batch, *in]`.
      w: a matrix without stacking axes, outputs first.
      n_in: the number of summed axes.
      dtype: of the result `[*batch, *out]`.
    """
    return _byte_product_forward(x, w, n_in, dtype)[0]


def _byte_product_forward(x, w, n_in, dtype):
    first = x.ndim - n_in
    codes, scale = _rounded(x, tuple(range(first, x.ndim)))
    # Products of plain matrices: with more axes a CPU takes twice as long.
    inputs = math.prod(x.shape[first:])
    codes = codes.reshape(*x.shape[:first], inputs)
    y = _dot(codes, w.codes.reshape(-1, inputs), jnp.int32) * scale[..., None]
    y = (y * jnp.expand_dims(w.scale.reshape(-1), range(first))).astype(dtype)
    return y.reshape(*x.shape[:first], *w.scale.shape), (w, jnp.zeros(0, x.dtype))


def _byte_product_backward(n_in, dtype, kept, d_y):
    w, like = kept
    first = d_y.ndim - w.scale.ndim
    d_y = d_y * jnp.expand_dims(w.scale, range(first))
    codes, scale = _rounded(d_y, tuple(range(first, d_y.ndim)))
    codes = codes.reshape(*d_y.shape[:first], -1)
    d_x = _dot(codes, w.codes.reshape(w.scale.size, -1).T, jnp.int32)
    d_x = (d_x * scale[..., None]).astype(like.dtype)
    return d_x.reshape(*d_y.shape[:first], *w.codes.shape[w.scale.ndim :]), None


byte_product.defvjp(_byte_product_forward, _byte_product_backward)


def _rounded(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Codes of `x`, and float32 scales without `axes`, over which each is shared."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axes, keepdims=True) / LARGEST
    codes = jnp.round(x / jnp.maximum(scale, SMALLEST)).astype(jnp.int8)
    return codes, jnp.squeeze(scale, axes)


def _dot(x: Array, w: Array, dtype: Any = jnp.float32) -> Array:
    summed = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, summed, preferred_element_type=dtype)


def _multiply_bytes(x: Array, codes: Array) -> Array:
    """`x @ codes.T`, float32, with the inputs of each row rounded to bytes, too.

    A CPU adds products of bytes twice as fast as those of bfloat16, and would first
    make a wide copy of the weights otherwise.
    """
    rounded, scale = _rounded(x, (x.ndim - 1,))
    return _dot(rounded, codes, jnp.int32) * scale[..., None]
