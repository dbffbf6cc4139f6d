"""The table of accelerators: peak FLOP/s, memory and bandwidths of one chip.

Sources, by the name in `Chip.source`:
  cloud    https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: the tables of key
           specifications and of the supported shapes. The ICI bandwidth given there is
           the sum over all ports and both directions; here it is one port, one way.
  book     https://jax-ml.github.io/scaling-book/tpus: ICI and DCN bytes/s, and the
           lengths at which a torus closes.
  libtpu   the HBM that its compiler reports as available (libtpu 0.0.52), which
           excludes what the compiler reserves.
  nvidia   the data sheets of A100, H100, H200 and L4, dense bf16; NVLink and network
           cards as in DGX A100 and DGX H100.
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
      name: the name that users write.
      kind: the beginning of JAX's `device_kind`.
      flops: dense bf16 FLOP/s.
      hbm: bytes of memory that a program can use.
      hbm_bandwidth: bandwidth of that memory.
      link: bandwidth of one link of a TPU's torus, or of a GPU to its NVLink switch.
      network: a device's share of the bandwidth between slices or hosts.
      hosted: number of devices of one host; for GPUs, of one NVLink switch.
      shapes: shapes of the slices on offer; empty for chips without a torus.
      ring: an axis of the torus closes to a ring at multiples of this length.
      source: the sources of the numbers, see the top of this file.
      capability: compute capability of a GPU, by which its kernels are chosen.
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
        # An axis of a v4 or v5p slice closes only where the slice is whole 4x4x4 cubes.
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
    """The chip of JAX's `device_kind`, or None where the table does not have it."""
    spelled = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    kind = spelled.get(kind, kind)
    # Whole words, because an L40 is not an L4. The longest match, because the kind of
    # v5p is the beginning of that of v5e.
    matching = [c for c in CHIPS.values() if re.match(rf"{c.kind}\b", kind)]
    return max(matching, key=lambda chip: len(chip.kind), default=None)
