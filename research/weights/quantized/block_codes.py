"""Frozen weights in four bits each, with a scale for every 64 inputs of an output.

The scales are in codes, too, of eight bits: "double quantization" of QLoRA (Dettmers
et al. 2023, arXiv:2305.14314, section 3). A weight then takes 4.13 bits, and 4.52 where
16 inputs share a scale. With an offset beside each scale, also in such a code, a block
has its steps from its least weight to its largest, as in Q4_1 of llama.cpp.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError
from research.weights.parameter_spec import Spec
from research.weights.quantized import int8_weights
from research.weights.quantized.int8_weights import Int8Matrix
from research.weights.quantized.quantized_matrix import (
    QuantizedMatrix,
    is_quantizable,
)

Array = jax.Array
BLOCK = 64  # Inputs that share a scale.
GROUP = 256  # Scales that share a range.
LAST_CODE = 255  # The largest code that a scale has.
SMALLEST = 1e-30  # In place of a scale of 0, by which nothing can be divided.
# The quantiles of a normal distribution, from -1 to 1 with an exact 0 (appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Multiples of a seventh; -8/7 serves where a rounded scale is too small.
INT4_LEVELS = tuple((code - 8) / 7 for code in range(16))
# Above the offset of a block.
INT4_32_LEVELS = tuple(float(code) for code in range(16))
LEVELS = {"nf4": NF4_LEVELS, "int4": INT4_LEVELS, "int4_32": INT4_32_LEVELS}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMatrix(QuantizedMatrix):
    """A matrix in four-bit codes, with the axes of the matrix in their order.

    The packed axis is the last of the inputs.

    Attributes:
      codes: uint8 with the shape of the matrix, but half of the packed axis: two codes
        in each, the first in the low bits.
      scales: uint8 codes of scales, a block of inputs in the place of the packed axis.
      ranges: `[*stack, groups, 2]` float32, the step between two scales, and the least
        one, of each `GROUP` scales in the order in which they lie; `[..., 4]` with
        those of offsets behind them.
      levels: a key of `LEVELS`.
      behind: the number of axes behind the packed one.
      offsets: as `scales`, what is added to the levels of a block times its scale; or
        None.
      flipped: see `QuantizedMatrix`.
    """

    codes: Array
    scales: Array
    ranges: Array
    levels: str = dataclasses.field(metadata={"static": True})
    behind: int = dataclasses.field(metadata={"static": True})
    offsets: Array | None = None
    flipped: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def form(self) -> str:
        return self.levels

    @property
    def stored_shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self._packed] *= 2
        return tuple(shape)

    @property
    def stack(self) -> int:
        return len(self.ranges.shape) - 2

    @property
    def _packed(self) -> int:
        return len(self.codes.shape) - 1 - self.behind

    def decode(self, dtype: Any) -> Array:
        packed = self._packed
        ones = [1] * (packed + 1), [1] * self.behind
        shifts = jnp.array([0, 4], jnp.uint8).reshape(*ones[0], 2, *ones[1])
        pairs = jnp.expand_dims(self.codes, packed + 1) >> shifts & jnp.uint8(15)
        scales = self._of_weights(self.scales, self.ranges[..., :2])
        if self.offsets is None:
            values = choose_levels(pairs, LEVELS[self.levels])
            return (values.reshape(self.stored_shape) * scales).astype(dtype)
        steps = pairs.astype(jnp.float32).reshape(self.stored_shape)
        offsets = self._of_weights(self.offsets, self.ranges[..., 2:])
        return (steps * scales + offsets).astype(dtype)

    def _of_weights(self, codes: Array, ranges: Array) -> Array:
        """The values of codes with a range for each `GROUP`, one for each weight."""
        shape, packed = codes.shape, self._packed
        count = math.prod(shape[self.stack :])
        ranges = jnp.repeat(ranges, GROUP, -2)[..., :count, :].reshape(*shape, 2)
        found = codes.astype(jnp.float32) * ranges[..., 0] + ranges[..., 1]
        return jnp.repeat(found, self.stored_shape[packed] // shape[packed], packed)

    def decode_rows(self, ids: Array, dtype: Any) -> Array:
        return self.decode(dtype)[ids]


class BlockFormat:
    """The `BaseFormat` of four-bit codes with these levels.

    Embeddings and the head are in one byte a weight: in four bits they would cost half
    as much loss again as all layers do, for a small share of the bytes.
    """

    def __init__(self, levels: str, block: int = BLOCK, has_offsets: bool = False):
        self.levels, self.block, self.has_offsets = levels, block, has_offsets

    def specs(self, spec: Spec) -> Spec | Int8Matrix | BlockMatrix:
        """A block is the largest divisor of the packed axis up to `block`.

        Raises:
          UserError: the packed axis is odd.
        """
        if "vocab" in spec.axes or not is_quantizable(spec):
            return int8_weights.FORMAT.specs(spec)
        packed = _packed_axis(spec)
        size = spec.shape[packed]
        if size % 2:
            raise UserError(
                f"{self.levels} packs two inputs in a byte, and "
                f"a matrix {list(spec.shape)} has {size}: use --config.model.quantize="
                "int8, or give this matrix int8 with --config.model.quantize_paths"
            )
        block = next(n for n in range(min(self.block, size), 0, -1) if size % n == 0)
        first = spec.stacked

        def part(length: int, divides: bool) -> Spec:
            shape = (*spec.shape[:packed], length, *spec.shape[packed + 1 :])
            return Spec(
                shape, spec.axes, 0, first, dtype="uint8", keeps_odd_axes=not divides
            )

        scales = part(size // block, False)
        groups = -(-math.prod(scales.shape[first:]) // GROUP)
        ranges = Spec(
            (*spec.shape[:first], groups, 4 if self.has_offsets else 2),
            (*spec.axes[:first], "groups", "groups"),
            0,
            first,
            dtype="float32",
        )
        behind = len(spec.shape) - 1 - packed
        offsets = scales if self.has_offsets else None
        codes = part(size // 2, True)
        return BlockMatrix(codes, scales, ranges, self.levels, behind, offsets)

    def store(self, weight: Array, spec: Spec) -> Array | QuantizedMatrix:
        """`weight` in the nearest codes; every mesh computes the same ones.

        For that the ranges are those from the smallest to the largest scale, where the
        paper takes a mean off: sums depend on their order.
        """
        like = self.specs(spec)
        if not isinstance(like, BlockMatrix):
            return int8_weights.FORMAT.store(weight, spec)
        packed, (count, block) = _packed_axis(spec), _blocks(like)
        weight = weight.astype(jnp.float32)
        blocks = weight.reshape(
            *weight.shape[:packed], count, block, *weight.shape[packed + 1 :]
        )
        offsets, others = None, []
        if self.has_offsets:
            least = jnp.min(blocks, packed + 1)
            largest = (jnp.max(blocks, packed + 1) - least) / INT4_32_LEVELS[-1]
            offsets, *others, least = _code_scales(least, spec.stacked)
            blocks -= jnp.expand_dims(least, packed + 1)
        else:
            largest = jnp.max(jnp.abs(blocks), packed + 1)
        codes, ranges, scales = _code_scales(largest, spec.stacked)
        ranges = jnp.concatenate([ranges, *others], -1)
        scaled = blocks / jnp.maximum(jnp.expand_dims(scales, packed + 1), SMALLEST)
        nearest = _nearest(scaled, self.levels).reshape(
            *weight.shape[:packed], -1, 2, *weight.shape[packed + 1 :]
        )
        low, high = (
            jax.lax.index_in_dim(nearest, i, packed + 1, keepdims=False) for i in (0, 1)
        )
        return dataclasses.replace(
            like,
            codes=low | (high << 4),
            scales=codes,
            ranges=ranges,
            offsets=offsets,
        )


def _packed_axis(spec: Spec) -> int:
    return spec.stacked + spec.n_in - 1


def _blocks(like: BlockMatrix) -> tuple[int, int]:
    """The number of blocks along the packed axis, and the size of one."""
    axis = len(like.codes.shape) - 1 - like.behind
    count = like.scales.shape[axis]
    return count, 2 * like.codes.shape[axis] // count


def _code_scales(scales: Array, stack: int) -> tuple[Array, Array, Array]:
    """Scales, or offsets, as codes, their ranges, and what these stand for."""
    shape = scales.shape
    flat = scales.reshape(*shape[:stack], -1)
    count = flat.shape[-1]
    padding = [(0, 0)] * stack + [(0, -count % GROUP)]
    groups = jnp.pad(flat, padding, "edge").reshape(*shape[:stack], -1, GROUP)
    least = jnp.min(groups, -1, keepdims=True)
    step = (jnp.max(groups, -1, keepdims=True) - least) / LAST_CODE
    codes = jnp.round((groups - least) / jnp.maximum(step, SMALLEST))
    found = codes * step + least

    def whole(x: Array) -> Array:
        return x.reshape(*shape[:stack], -1)[..., :count].reshape(shape)

    ranges = jnp.concatenate([step, least], -1)
    return whole(codes.astype(jnp.uint8)), ranges, whole(found)


def _nearest(x: Array, levels: str) -> Array:
    """The code of the nearest level, uint8."""
    values = np.array(LEVELS[levels], np.float32)
    middles = (values[1:] + values[:-1]) / 2
    above = [(x > middle).astype(jnp.uint8) for middle in middles]
    return functools.reduce(jnp.add, above)


def choose_levels(codes: Array, levels: Sequence[float]) -> Array:
    """Those of 16 `levels` that are numbered by codes, float32.

    Chosen by the four bits one after the other, which every device does in registers:
    on a CPU a lookup in a table takes twice as long.
    """
    # Not `jnp.where`: a loop over layers would make and hold an array of each level.
    found = [jnp.broadcast_to(jnp.float32(level), codes.shape) for level in levels]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [jax.lax.select(is_set, one, zero) for zero, one in pairs]
    return found[0]
