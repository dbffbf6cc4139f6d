"""Frozen matrices in the codes of the file that they come from: nothing is rounded."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.weights.parameter_spec import Spec
from research.weights.quantized.block_codes import choose_levels
from research.weights.quantized.block_kind import BlockKind, CodedMatrix
from research.weights.quantized.quantized_matrix import QuantizedMatrix
from research.weights.representations.plain_array import PlainArrays

Array = jax.Array
# Into fields of how many bits a code is cut, the low ones first: a byte holds fields of
# neighbours, and no code crosses the border of two bytes.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
# A matrix that a file has as numbers is stored as an array.
FORMAT = PlainArrays()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptMatrix(QuantizedMatrix):
    """A matrix in the codes of a file, with the axes that have rows in the file first.

    Those are the outputs, and of a table of embeddings the ids. The others, `inputs`,
    are one axis here, along which the blocks lie.

    Attributes:
      planes: for each of `PLANES`, uint8 `[*stack, *rows, inputs * bits / 8]`.
      scales: `[*stack, *rows, blocks]`.
      offsets: as `scales`, or None.
      zeros: as `scales`, uint8, or None.
      kind: what the codes stand for.
      inputs: the shape of the inputs of one matrix.
      n_first: the number of axes of rows.
      flipped: see `QuantizedMatrix`.
    """

    planes: tuple[Array, ...]
    scales: Array
    offsets: Array | None
    zeros: Array | None
    kind: BlockKind = dataclasses.field(metadata={"static": True})
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_first: int = dataclasses.field(metadata={"static": True})
    flipped: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def form(self) -> str:
        return self.kind.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], *self.inputs)

    @property
    def stack(self) -> int:
        return len(self.scales.shape) - 1 - self.n_first

    @property
    def lead(self) -> int:
        return self.n_first

    def decode(self, dtype: Any) -> Array:
        """Computes as `CodedMatrix.decode`, and gives the same numbers."""
        kind, codes = self.kind, _join(self.planes, PLANES[self.kind.bits])
        if kind.levels:
            values = choose_levels(codes, kind.levels)
        else:
            values = codes.astype(jnp.float32)
        blocks = values.reshape(*self.scales.shape, kind.block)
        if self.zeros is not None:
            blocks -= self.zeros.astype(jnp.float32)[..., None]
        elif kind.zero:
            blocks -= kind.zero
        blocks *= self.scales.astype(jnp.float32)[..., None]
        if self.offsets is not None:
            blocks += self.offsets.astype(jnp.float32)[..., None]
        return _rounded(blocks, kind.rounds_to).astype(dtype).reshape(self.stored_shape)

    def decode_rows(self, ids: Array, dtype: Any) -> Array:
        return jax.tree.map(lambda x: x[ids], self).decode(dtype)


def kept_specs(spec: Spec, kind: BlockKind) -> KeptMatrix:
    """The `KeptMatrix` of the matrix `spec`, with a `Spec` for each array."""
    first, last = spec.stacked, len(spec.shape)
    ends = first + spec.n_in
    into, rows = range(first, ends), range(ends, last)
    if spec.is_table:
        into, rows = rows, into
    inputs = tuple(spec.shape[i] for i in into)
    outer = (*range(first), *rows)
    axes = (*(spec.axes[i] for i in outer), spec.axes[into[0]])

    def part(length: int, dtype: str) -> Spec:
        shape = (*(spec.shape[i] for i in outer), length)
        return Spec(shape, axes, 0, first, dtype=dtype)

    size = math.prod(inputs)
    blocks = size // kind.block
    return KeptMatrix(
        planes=tuple(part(size * n // 8, "uint8") for n in PLANES[kind.bits]),
        scales=part(blocks, kind.scales),
        offsets=part(blocks, kind.offsets) if kind.offsets else None,
        zeros=part(blocks, "uint8") if kind.zeros else None,
        kind=kind,
        inputs=inputs,
        n_first=len(rows),
        flipped=not spec.is_table,
    )


def kept_parts(matrix: CodedMatrix) -> list[np.ndarray]:
    """The arrays of a `KeptMatrix`, in the order of its leaves, with one axis of rows.

    The axes of rows that it has are one axis, as in `[*stack, rows, bytes]`.
    """
    planes = _cut(matrix.codes, PLANES[matrix.kind.bits])
    others = (matrix.scales, matrix.offsets, matrix.zeros)
    return [*planes, *(x for x in others if x is not None)]


def _cut(codes: np.ndarray, planes: tuple[int, ...]) -> list[np.ndarray]:
    found, low = [], 0
    for bits in planes:
        fields = (codes >> np.uint8(low)) & np.uint8(2**bits - 1)
        fields = fields.reshape(*codes.shape[:-1], -1, 8 // bits)
        plane = fields[..., 0].copy()
        for i in range(1, 8 // bits):
            plane |= fields[..., i] << np.uint8(bits * i)
        found.append(plane)
        low += bits
    return found


def _join(planes: tuple[Array, ...], widths: tuple[int, ...]) -> Array:
    """The codes, uint8, of which `_cut` makes `planes`."""
    codes, low = None, 0
    for plane, bits in zip(planes, widths, strict=True):
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[(None,) * plane.ndim]
        fields = (plane[..., None] >> shifts) & jnp.uint8(2**bits - 1)
        fields = fields.reshape(*plane.shape[:-1], -1)
        codes = fields if codes is None else codes | (fields << low)
        low += bits
    return codes


def _rounded(x: Array, dtype: str) -> Array:
    """float32 numbers rounded to another dtype, in float32.

    Not by casts: a compiler may take one to a dtype and back for none at all.
    """
    if not dtype:
        return x
    if dtype == "bfloat16":
        return jax.lax.reduce_precision(x, 8, 7)
    # float16: its numbers below 2^-14 are multiples of 2^-24.
    small = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, small, jax.lax.reduce_precision(x, 8, 10))
