"""Kinds of codes that files hold: what the codes and scales of a matrix stand for."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """How a matrix lies in codes, of which neighbouring inputs share a scale.

    A code stands for `(code - zero) * scale + offset`, computed in float32. Scales and
    offsets have so few bits that the product is exact in all kinds with an offset, so a
    fused multiplication and addition gives the same number as two steps.

    Attributes:
      name: as its library calls it, such as `q4_1`.
      bits: of a code.
      block: inputs that share a scale.
      scales: dtype of the scales.
      offsets: dtype of the offsets; "" if there are none.
      zeros: whether each block has a zero of its own, uint8, in the place of `zero`.
      zero: the code that stands for 0.
      levels: what the codes stand for before scaling; () if for themselves.
      rounds_to: dtype to which the library rounds a weight; "" if to none.
    """

    name: str
    bits: int
    block: int
    scales: str
    offsets: str = ""
    zeros: bool = False
    zero: int = 0
    levels: tuple[float, ...] = ()
    rounds_to: str = ""


@dataclasses.dataclass(frozen=True)
class CodedMatrix:
    """A matrix of a file in codes, on the host.

    Attributes:
      kind: what they stand for.
      codes: `[*stack, out, in]` uint8, one code in each.
      scales: `[*stack, out, in / block]`.
      offsets: as `scales`, or None.
      zeros: as `scales`, uint8, or None.
    """

    kind: BlockKind
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    zeros: np.ndarray | None = None

    def rows(self, rows: np.ndarray) -> "CodedMatrix":
        """The matrix of these rows, in this order."""
        parts = {
            name: None if part is None else part[..., rows, :]
            for name in ("codes", "scales", "offsets", "zeros")
            for part in [getattr(self, name)]
        }
        return dataclasses.replace(self, **parts)

    def widened(self, kind: BlockKind) -> "CodedMatrix":
        """The same numbers in the codes of `kind`, which `common_kind` found."""
        if kind == self.kind:
            return self
        scales = self.scales.astype(np.float32)
        offsets = self.offsets
        if offsets is None:
            offsets = scales * np.float32(-self.kind.zero)
        repeats = self.kind.block // kind.block
        return CodedMatrix(
            kind,
            self.codes,
            np.repeat(scales, repeats, -1),
            np.repeat(offsets.astype(np.float32), repeats, -1),
        )

    def decode(self) -> np.ndarray:
        """`[*stack, out, in]`, in the dtype to which the library rounds, or float32."""
        kind = self.kind
        if kind.levels:
            values = np.array(kind.levels, np.float32)[self.codes]
        else:
            values = self.codes.astype(np.float32)
        blocks = values.reshape(*self.scales.shape, kind.block)
        if self.zeros is not None:
            blocks -= self.zeros.astype(np.float32)[..., None]
        elif kind.zero:
            blocks -= np.float32(kind.zero)
        blocks *= self.scales.astype(np.float32)[..., None]
        if self.offsets is not None:
            blocks += self.offsets.astype(np.float32)[..., None]
        whole = blocks.reshape(self.codes.shape)
        return whole.astype(jnp.dtype(kind.rounds_to)) if kind.rounds_to else whole


def common_kind(kinds: Sequence[BlockKind]) -> BlockKind | None:
    """The kind that holds the numbers of all `kinds`; None if there is none.

    Files mix types from layer to layer, and the layers of a parameter are one array. An
    offset in the place of a zero is exact, as zeros are powers of two.
    """
    if len({*kinds}) == 1:
        return kinds[0]
    if any(kind.levels or kind.zeros or kind.rounds_to for kind in kinds):
        return None
    return BlockKind(
        "+".join(sorted({kind.name for kind in kinds})),
        max(kind.bits for kind in kinds),
        math.gcd(*(kind.block for kind in kinds)),
        "float32",
        "float32",
    )
