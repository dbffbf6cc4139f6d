"""What one accelerator can do: the one table of peaks, memories and bandwidths.

Sources, by the name in `Chip.source`:
  cloud    https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: the tables of key
           specifications (a chip's ICI bandwidth is there the sum over its ports, in
           both directions; here one port, one direction) and of the supported shapes.
  book     https://jax-ml.github.io/scaling-book/tpus: ICI and DCN bytes/s, and where a
           torus closes.
  libtpu   the HBM that its compiler says is available (libtpu 0.0.52): what it keeps
           for itself is taken off.
  nvidia   the data sheets of A100, H100, H200 and L4, dense bf16; NVLink and network
           card as in DGX A100 and DGX H100.
"""

import dataclasses
import re
from collections.abc import Mapping

GIB = 2**30

SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
    "8x16x16", "16x16x16",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; bandwidths in bytes/s, one direction.

    Attributes:
      name: as users write it.
      kind: how JAX's `device_kind` begins.
      flops: dense bf16 FLOP/s.
      hbm: bytes of memory that a program can have.
      hbm_bandwidth: of that memory.
      link: of one link of a TPU's torus, or of a GPU into its NVLink switch.
      network: of the network between slices or hosts, a device's share.
      hosted: devices of one host, which for GPUs is one NVLink switch.
      shapes: of the slices one can rent; empty for what has no torus.
      ring: length at which an axis of the torus closes to a ring, or multiples of it.
      source: see above.
      capability: compute capability of a GPU, which its kernels ask for.
    """

    name: str
    kind: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    network: float
    hosted: int
    shapes: tuple[str, ...] = ()
    ring: int = 0
    source: str = ""
    capability: str = "0.0"

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`, as JAX calls it."""
        known = {"TPU": "tpu", "NVIDIA": "gpu"}
        return known.get(self.kind.partition(" ")[0], "cpu")


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # An axis of v4 and v5p closes only in slices of whole 4x4x4 cubes.
        Chip(
            "v4", "TPU v4", 275e12, 30.5 * GIB, 1.2e12, 4.5e10, 6.25e9, 4, CUBES, 4,
            "cloud; book; libtpu, twice a core's",
        ),
        Chip(
            "v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 8.19e11, 4.5e10, 3.125e9, 8,
            SQUARES, 16, "cloud; book; libtpu",
        ),
        Chip(
            "v5p", "TPU v5", 459e12, 95.73 * GIB, 2.765e12, 9e10, 6.25e9, 4,
            (*CUBES, "16x16x24"), 4, "cloud; book; libtpu",
        ),
        Chip(
            "v6e", "TPU v6 lite", 918e12, 31.24 * GIB, 1.638e12, 9e10, 1.25e10, 8,
            SQUARES, 16, "cloud; book; libtpu",
        ),
        Chip(
            "a100", "NVIDIA A100", 312e12, 80e9, 2.039e12, 3e11, 2.5e10, 8,
            source="nvidia", capability="8.0",
        ),
        Chip(
            "h100", "NVIDIA H100", 989e12, 80e9, 3.35e12, 4.5e11, 5e10, 8,
            source="nvidia", capability="9.0",
        ),
        Chip(
            "h200", "NVIDIA H200", 989e12, 141e9, 4.8e12, 4.5e11, 5e10, 8,
            source="nvidia", capability="9.0",
        ),
        Chip(
            "l4", "NVIDIA L4", 121e12, 24e9, 3e11, 3.2e10, 6.25e9, 8,
            source="nvidia", capability="8.9",
        ),
    )
}  # fmt: skip


def by_device_kind(kind: str) -> Chip | None:
    """The chip that JAX names so, or None where it is not in the table."""
    spelled = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    kind = spelled.get(kind, kind)
    # Whole words: `NVIDIA L4` is no L40. The longest: v5p's name begins v5e's.
    matching = [c for c in CHIPS.values() if re.match(rf"{c.kind}\b", kind)]
    return max(matching, key=lambda chip: len(chip.kind), default=None)
