"""The chips that a plan is for: which, how many, and how they are connected."""

import contextlib
import dataclasses
import glob
import math
import re
import subprocess
from collections.abc import Sequence

import psutil

from research.core.errors import UserError, nearest
from research.parallel.chips import CHIPS, Chip, by_device_kind, find_chip, memory_of
from research.parallel.memory_limits import memory_limit

HERE = "here"  # Stands for the chips of this machine.
ANSWERING = 120.0  # seconds that the driver has to name its cards


@dataclasses.dataclass(frozen=True)
class PlannedDevices:
    """The devices of a plan.

    Attributes:
      count: number of devices in all slices.
      slices: number of groups of `count / slices` devices, joined by the network.
      shape: sizes of the torus of a slice; empty for chips without a torus.
    """

    chip: Chip
    count: int
    slices: int = 1
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape)) or str(self.count // self.slices)
        return f"{self.slices} x {self.chip.name}:{size}".removeprefix("1 x ")

    def closes(self, axis: int) -> bool:
        """Whether an axis of the torus is a ring and not a line."""
        ring = self.chip.ring
        whole = [n for n in self.shape if n % ring == 0]
        if len(self.shape) == 3:
            return len(whole) == 3
        return self.shape[axis] % ring == 0

    def devices(self) -> list["DeviceStandIn"]:
        """Stand-ins for the devices, in the order in which JAX lists real ones."""
        each = self.count // self.slices
        return [
            DeviceStandIn(
                id=i,
                process_index=i // self.chip.hosted,
                slice_index=i // each,
                coords=_unravel(i % each, self.shape),
                platform=self.chip.platform,
                device_kind=self.chip.kinds[0],
                compute_capability=self.chip.capability,
            )
            for i in range(self.count)
        ]


@dataclasses.dataclass(frozen=True)
class DeviceStandIn:
    """The attributes of a `jax.Device` that meshes and kernel choices read."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    platform: str
    device_kind: str
    core_on_chip: int = 0
    compute_capability: str = "0.0"


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Three coordinates, the first varying fastest, as TPUs are numbered."""
    coords = []
    for size in (*shape, 1, 1, 1)[:3]:
        index, here = divmod(index, size)
        coords.append(here)
    return tuple(coords)


def parse_topology(
    text: str, slices: int = 1, flag: str = "--topology"
) -> PlannedDevices:
    """Reads whole TPU slices from `v5e:4x4`; errors name `flag`.

    Raises:
      UserError: there is no such chip, or no slice of that shape.
    """
    name, _, shape = text.partition(":")
    chip = _chip(text, name, [c for c in CHIPS.values() if c.shapes], flag)
    if not _exists(chip, shape):
        raise UserError(
            f"{flag} is {text!r}; {chip.name} is known as "
            f"{', '.join(f'{chip.name}:{s}' for s in chip.shapes)}"
        )
    sizes = tuple(map(int, shape.split("x")))
    return PlannedDevices(chip, math.prod(sizes) * slices, slices, sizes)


def _exists(chip: Chip, shape: str) -> bool:
    """Whether a slice has this shape: one of the table, or one made of whole cubes.

    The sizes of a shape of cubes ascend, up to the largest slice of the table.
    """
    if shape in chip.shapes:
        return True
    if chip.ring != 4 or not re.fullmatch(r"\d+x\d+x\d+", shape):
        return False
    sizes = [int(n) for n in shape.split("x")]
    largest = max(map(_chips, chip.shapes))
    cubes = all(n and n % chip.ring == 0 for n in sizes)
    return cubes and sizes == sorted(sizes) and math.prod(sizes) <= largest


def parse_device(text: str, slices: int = 1, cpu_flops: float = 0.0) -> PlannedDevices:
    """Reads devices from `h100:8`, `4090x2`, `24GB`, `v5e:4x4`, `v5p:64` or `cpu`.

    `cpu_flops`: FLOP/s of all cores of this machine together.

    Raises:
      UserError: there is no such chip, or no such number of them.
    """
    name, size = _split_count(text)
    chip = memory_of(name)
    if name != "cpu" and chip is None:
        more = ("cpu", "a memory such as 24GB")
        chip = _chip(text, name, list(CHIPS.values()), "--device", more)
        if chip.shapes:
            # If several shapes have as many chips, the first of the table counts.
            counts = {str(_chips(shape)): shape for shape in reversed(chip.shapes)}
            shape = counts.get(size or "1", size)
            return parse_topology(f"{chip.name}:{shape}", slices, "--device")
    if size and not (size.isascii() and size.isdigit() and int(size)):
        raise UserError(
            f"--device is {text!r}; write it as h100:8, 4090x2, 24GB, v5e:4x4 or cpu"
        )
    count = int(size or 1)
    if chip is not None:
        return PlannedDevices(chip, count * slices, slices)
    # The devices share the cores and the memory of this machine.
    memory = min(psutil.virtual_memory().total, memory_limit())
    flops = cpu_flops / count
    chip = Chip("cpu", ("cpu",), flops, memory / count, 0.0, 0.0, 0.0, count)
    return PlannedDevices(chip, count)


def local_device() -> str:
    """The chips of this machine as `parse_device` reads them; `cpu` without others.

    No accelerator is opened: a training may hold it.

    Raises:
      UserError: the machine has chips of a kind that is not known here, or its driver
        does not answer.
    """
    cards: list[str] = []
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        try:
            answer = subprocess.run(
                ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=ANSWERING,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                "nvidia-smi has not named the cards of this machine in "
                f"{ANSWERING:g} s: name their kind in place of here, as h100:8 or 24GB"
            ) from error
        cards = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    chip = by_device_kind(cards[0]) if cards else None
    if chip:
        return f"{chip.name}:{cards.count(cards[0])}"
    if cards or glob.glob("/dev/accel*"):
        found = cards[0] if cards else "TPUs"
        raise UserError(
            f"the chips of this machine are {found}: name their kind in place "
            "of here, as h100:8, v5e:2x4 or 24GB"
        )
    return "cpu"


def _split_count(text: str) -> tuple[str, str]:
    """`h100` and `8` of `h100:8` or `h100x8`; a name may end in an x, as `mi300x`."""
    name, colon, size = text.partition(":")
    counted = re.fullmatch(r"(.+)x(\d+)", text)
    if counted and not colon and not find_chip(text):  # rtx4090 has no count.
        name, size = counted.groups()
    return name, size


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _chip(
    text: str, name: str, known: list[Chip], flag: str, more: Sequence[str] = ()
) -> Chip:
    chip = find_chip(name)
    if chip not in known:
        names = [c.name for c in known]
        # `24`, `24G` and `24 gigabytes` are a memory; `a100-40` is a chip.
        size = re.match(r"\d+", name) if more and not nearest(name, names) else None
        hint = f" (did you mean '{size[0]}GB'?)" if size else nearest(name, names)
        raise UserError(
            f"{flag} is {text!r}; {name!r} is none of {', '.join([*names, *more])}"
            f"{hint}"
        )
    return chip
