"""The table of accelerators: peak FLOP/s, memory and bandwidths of one chip.

FLOP/s are those of dense bf16 products that add up in float32, without sparsity, and
those of products of bytes that add up in int32. Data sheets often print twice that: for
sparse matrices, and for consumer cards for products that add up in float16. A number
without a source is 0, and nothing is claimed from it.

Sources, by the name in `Chip.source`:
  cloud    https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: the tables of key
           specifications and of the supported shapes. The ICI bandwidth given there is
           the sum over all ports and both directions; here it is one port, one way.
  book     https://jax-ml.github.io/scaling-book/tpus: ICI and DCN bytes/s, and the
           lengths at which a torus closes.
  libtpu   the HBM that its compiler reports as available (libtpu 0.0.52), which
           excludes what the compiler reserves.
  dgx      https://docs.nvidia.com/dgx: a network card of DGX A100, H100, H200, B200.
  others   the data sheet or white paper above the row; a link is one way.
"""

import dataclasses
import re
from collections.abc import Mapping

from research.core.errors import look_up

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
      kinds: what JAX calls it in `device_kind`.
      flops: dense bf16 FLOP/s.
      hbm: bytes of memory that a program can use.
      hbm_bandwidth: bandwidth of that memory.
      link: bandwidth of one link of a TPU's torus, or of a GPU to the other GPUs of
        its host: by NVLink or Infinity Fabric, else by PCIe.
      network: a device's share of the bandwidth between slices or hosts.
      hosted: most devices of one host; for GPUs, of one NVLink switch.
      shapes: shapes of the slices on offer; empty for chips without a torus.
      ring: an axis of the torus closes to a ring at multiples of this length.
      source: the sources of the numbers, see the top of this file.
      capability: compute capability of a GPU, by which its kernels are chosen; words
        may follow that say where it is from.
      int8_flops: dense products of int8, in the same unit as `flops`.
    """

    name: str
    kinds: tuple[str, ...]
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
    int8_flops: float = 0.0

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`, as JAX calls it."""
        known = {"TPU": "tpu", "NVIDIA": "gpu", "AMD": "gpu", "cpu": "cpu"}
        return look_up(known, self.kinds[0].partition(" ")[0], "the maker of a chip")


# Words around a chip's name that say no more than it does.
UNSAID = {"", "nvidia", "amd", "tesla", "geforce", "rtx", "instinct", "sxm", "mega"}

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # An axis of a v4 or v5p slice closes only where the slice is whole 4x4x4 cubes.
        Chip(
            "v4", ("TPU v4",), 275e12, 30.5 * GIB, 1.2e12, 4.5e10, 6.25e9, 4, CUBES, 4,
            "cloud; book; libtpu, twice a core's",
        ),
        Chip(
            "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 8.19e11, 4.5e10,
            3.125e9, 8, SQUARES, 16, "cloud; book; libtpu", int8_flops=394e12,
        ),
        Chip(
            "v5p", ("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2.765e12, 9e10, 6.25e9,
            4, (*CUBES, "16x16x24"), 4, "cloud; book; libtpu", int8_flops=918e12,
        ),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1.638e12, 9e10,
            1.25e10, 8, SQUARES, 16, "cloud; book; libtpu", int8_flops=1836e12,
        ),
        # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
        # nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
        Chip(
            "a100-40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12,
            40e9, 1.555e12, 3e11, 2.5e10, 8,
            source="A100 data sheet; dgx", capability="8.0", int8_flops=624e12,
        ),
        Chip(
            "a100-80", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312e12,
            80e9, 2.039e12, 3e11, 2.5e10, 8,
            source="A100 data sheet; dgx", capability="8.0", int8_flops=624e12,
        ),
        # https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306: 1,979
        # TFLOP/s and 3,958 TOP/s of int8 with sparsity; the PCIe card is slower and is
        # not in this table.
        Chip(
            "h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3.35e12, 4.5e11, 5e10, 8,
            source="H100 data sheet; dgx", capability="9.0", int8_flops=1979e12,
        ),
        # https://www.nvidia.com/en-us/data-center/h200: 1,979 and 3,958 with sparsity.
        Chip(
            "h200", ("NVIDIA H200",), 989e12, 141e9, 4.8e12, 4.5e11, 5e10, 8,
            source="H200 data sheet; dgx", capability="9.0", int8_flops=1979e12,
        ),
        # https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet: 36 PFLOP/s
        # with sparsity and 1,440 GB over eight GPUs.
        Chip(
            "b200", ("NVIDIA B200",), 2250e12, 180e9, 8e12, 9e11, 5e10, 8,
            source="DGX B200 data sheet; dgx", capability="10.0",
        ),
        # https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/
        # data-sheets/amd-instinct-mi300x-data-sheet.pdf: seven links of 128 GB/s, both
        # ways together. JAX gives the architecture in place of a capability.
        Chip(
            "mi300x", ("AMD Instinct MI300X",), 1307e12, 192e9, 5.3e12, 4.48e11, 0.0, 8,
            source="MI300X data sheet", capability="gfx942",
        ),
        # https://resources.nvidia.com/en-us-l4/l4-datasheet: 242 with sparsity. All
        # cards from here on are connected by PCIe.
        Chip(
            "l4", ("NVIDIA L4",), 121e12, 24e9, 3e11, 3.2e10, 0.0, 8,
            source="L4 data sheet", capability="8.9",
        ),
        # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413: 733 with
        # sparsity.
        Chip(
            "l40s", ("NVIDIA L40S",), 362e12, 48e9, 8.64e11, 3.2e10, 0.0, 8,
            source="L40S data sheet", capability="8.9",
        ),
        # https://d1.awsstatic.com/product-marketing/ec2/
        # NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf: 140 with sparsity. An A10 is
        # another card.
        Chip(
            "a10g", ("NVIDIA A10G",), 70e12, 24e9, 6e11, 3.2e10, 0.0, 8,
            source="A10G data sheet", capability="8.6",
        ),
        # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-
        # whitepaper-v2.pdf, table 9: 142 where products add up in float16.
        Chip(
            "3090", ("NVIDIA GeForce RTX 3090",), 71e12, 24e9, 9.36e11, 3.2e10, 0.0, 8,
            source="GA102 white paper", capability="8.6",
        ),
        # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/
        # nvidia-ada-gpu-architecture.pdf, appendix A: 330.3 where products add up in
        # float16.
        Chip(
            "4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 24e9, 1.008e12, 3.2e10, 0.0,
            8, source="Ada white paper", capability="8.9",
        ),
        # https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/
        # nvidia-rtx-blackwell-gpu-architecture.pdf, appendix: 419 where products add
        # up in float16, and 838 with sparsity, too.
        Chip(
            "5090", ("NVIDIA GeForce RTX 5090",), 209.5e12, 32e9, 1.792e12, 6.4e10, 0.0,
            8, source="RTX Blackwell white paper", capability="12.0",
        ),
    )
}  # fmt: skip


def find_chip(text: str) -> Chip | None:
    """The chip that people call `h100`, `RTX 4090`, `A100-80GB-SXM` or `nvidia-l4`.

    An A100 without its memory is that of 80 GB.
    """
    words = re.split(r"[\s_-]+", re.sub(r"\brtx(?=\d)", "", text.lower()))
    name = "-".join(re.sub(r"(?<=\d)gb$", "", w) for w in words if w not in UNSAID)
    sized = {f"{chip.name}-{chip.hbm / 1e9:.0f}": chip for chip in CHIPS.values()}
    return {**sized, **CHIPS, "a100": CHIPS["a100-80"]}.get(name)


def memory_of(text: str) -> Chip | None:
    """A GPU of which only the memory is known, from `24GB` or `24GiB`.

    It has no peak and no bandwidth. Kernels are chosen as for a GPU of 2020 or later.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?g(i?)b?", text.lower())
    if not found or not float(found[1]):
        return None
    nbytes = float(found[1]) * (GIB if found[2] else 1e9)
    name = f"{found[1]}G{found[2]}B"
    kinds = ("NVIDIA GPU",)
    capability = "8.0, as is assumed where only the memory is known"
    return Chip(name, kinds, 0.0, nbytes, 0.0, 0.0, 0.0, 8, capability=capability)


def by_device_kind(kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`, or None where the table does not have it.

    Names are compared whole: an H100 PCIe, a 4090 D and a MIG slice have other peaks.
    """
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
