"""Frozen weights in one byte each, for decoding, which is bound by reading them.

Symmetric, one scale for each output channel: `w = code * scale`, code in [-127, 127].
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.parameter_spec import Spec
from research.weights.representations.grouped_product import Groups, multiply_groups
from research.weights.representations.leaf import Leaf

Array = jax.Array
LARGEST = 127
SMALLEST = 1e-30  # In place of a scale of 0, by which nothing can be divided.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix(Leaf):
    """A matrix as codes and scales. It has no gradient.

    Output axes come first, the order in which a CPU multiplies fastest.

    Attributes:
      codes: `[*stack, *out, *in]` int8.
      scale: `[*stack, *out]` float32.
      n_out: the number of output axes.
      flipped: whether it stands for the transposed matrix, `[out, in]`. A table of
        embeddings does: one scale for each id suits its rows and a tied head.
    """

    codes: Array
    scale: Array
    n_out: int = dataclasses.field(metadata={"static": True})
    flipped: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape, ends = self.codes.shape, len(self.scale.shape)
        if self.flipped:
            return tuple(shape)
        stack = ends - self.n_out
        return (*shape[:stack], *shape[ends:], *shape[stack:ends])

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        batch, inputs = x.shape[: x.ndim - n_in], math.prod(x.shape[x.ndim - n_in :])
        # Products of plain matrices: with more axes a CPU takes twice as long.
        x = x.reshape(*batch, inputs)
        if self.flipped:
            x = x * jnp.expand_dims(self.scale, range(len(batch))).astype(x.dtype)
            return _dot(x, self.codes.astype(x.dtype), 0).astype(dtype)
        y = jax.lax.platform_dependent(
            x,
            self.codes.reshape(-1, inputs),
            cpu=_multiply_bytes,
            default=lambda x, codes: _dot(x, codes.astype(x.dtype), 1),
        )
        y = y * jnp.expand_dims(self.scale.reshape(-1), range(y.ndim - 1))
        return y.astype(dtype).reshape(*batch, *self.scale.shape)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        matrices, inputs = self.codes.shape[0], x.shape[-1]
        codes = self.codes.reshape(matrices, -1, inputs)
        y = multiply_groups(x, codes, groups, True, jnp.dtype(jnp.float32))
        return (y * self.scale.reshape(matrices, -1)[groups.owners]).astype(dtype)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        if self.flipped:
            rows = self.codes[ids] * self.scale[ids][..., None]
            return rows.astype(dtype)
        return self.materialize()[ids].astype(dtype)

    def transpose(self) -> "Int8Matrix":
        return dataclasses.replace(self, flipped=not self.flipped)

    def materialize(self) -> Array:
        ends, n_in = self.scale.ndim, self.codes.ndim - self.scale.ndim
        whole = self.codes * jnp.expand_dims(self.scale, range(ends, ends + n_in))
        if self.flipped:
            return whole
        stack = ends - self.n_out
        return jnp.moveaxis(whole, range(ends, ends + n_in), range(stack, stack + n_in))


def int8_specs(spec: Spec) -> Int8Matrix:
    """The `Int8Matrix` of the matrix `spec`, with a `Spec` for each array."""
    stack, ends, is_table = spec.stacked, spec.stacked + spec.n_in, spec.is_table

    def moved(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return (
            values
            if is_table
            else (*values[:stack], *values[ends:], *values[stack:ends])
        )

    n_out = 1 if is_table else len(spec.shape) - ends
    codes = Spec(moved(spec.shape), moved(spec.axes), 0, stack, dtype="int8")
    own = stack + n_out
    scale = Spec(codes.shape[:own], codes.axes[:own], 0, stack, dtype="float32")
    return Int8Matrix(codes, scale, n_out, is_table)


def as_int8(weight: Array, spec: Spec) -> Int8Matrix:
    """`weight`, which `spec` describes, rounded to the nearest codes."""
    like = int8_specs(spec)
    first, last = spec.stacked, len(spec.shape)
    if not like.flipped:
        into = range(first, first + spec.n_in)
        weight = jnp.moveaxis(weight, into, range(last - spec.n_in, last))
    codes, scale = _rounded(weight, tuple(range(len(like.scale.shape), last)))
    return dataclasses.replace(like, codes=codes, scale=scale)


def _rounded(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Codes of `x`, and float32 scales without `axes`, over which each is shared."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axes, keepdims=True) / LARGEST
    codes = jnp.round(x / jnp.maximum(scale, SMALLEST)).astype(jnp.int8)
    return codes, jnp.squeeze(scale, axes)


def _dot(x: Array, w: Array, axis: int, dtype: Any = jnp.float32) -> Array:
    summed = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, summed, preferred_element_type=dtype)


def _multiply_bytes(x: Array, codes: Array) -> Array:
    """`x @ codes.T`, float32, with the inputs of each row rounded to bytes, too.

    A CPU adds products of bytes twice as fast as those of bfloat16, and would first
    make a wide copy of the weights otherwise.
    """
    rounded, scale = _rounded(x, (x.ndim - 1,))
    return _dot(rounded, codes, 1, jnp.int32) * scale[..., None]
