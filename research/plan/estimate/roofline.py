"""The least time of a step: for compute, memory, links and network, each alone."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.core.errors import look_up
from research.parallel.chips import Chip
from research.plan.estimate.step_flops import StepFlops
from research.plan.planned_devices import PlannedDevices
from research.plan.step_costs import Collective

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device; 0 if the chip's speed is not known.

    Attributes:
      compute: all products, recomputed ones included, each kind at the chip's peak.
      hbm: reads and writes of the device's memory.
      ici: collectives inside a slice or host.
      dcn: collectives between slices or hosts.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def overlapped(self) -> float:
        """Seconds if all four overlap; no step is faster."""
        return max(dataclasses.astuple(self))

    @property
    def summed(self) -> float:
        """Seconds if nothing overlaps."""
        return sum(dataclasses.astuple(self))

    @property
    def bound_by(self) -> str:
        """The name of the part that takes longest."""
        seconds = dataclasses.asdict(self)
        return max(seconds, key=lambda name: seconds[name])


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Speed and cost of a run whose steps take `seconds` each.

    `mfu` is the share of the chip's peak, for products of bytes of its peak for them.
    `days` and `chip_hours` are those of the whole run; None if its steps are unknown.
    """

    seconds: float
    mfu: float
    tokens_per_second: float
    days: float | None
    chip_hours: float | None


def make_roofline(
    flops: StepFlops,
    moved: float,
    collectives: Iterable[Collective],
    target: PlannedDevices,
    mesh: Mesh,
) -> Roofline:
    """Computes the least seconds of each part of a step.

    One device moves `moved` bytes from and to its memory, and takes part in
    `collectives`. `mesh` is of the chips of `target`, or of stand-ins for them.
    """
    chip = target.chip
    ici = dcn = 0.0
    devices = list(mesh.devices.flat)
    for collective in collectives:
        members = [devices[i] for i in collective.members]
        domains = len({_domain(device, target) for device in members})
        # Over the network each device of a slice or host sends only its own share.
        inside = len(members) // domains
        kind, times, nbytes = collective.kind, collective.times, collective.nbytes
        if domains > 1 and chip.network:
            across = wire_bytes(kind, nbytes / inside, domains)
            dcn += times * across / chip.network
        speed = link_speed(members, target)
        if kind == "collective-permute" and target.shape:
            # A hop to the next device uses at most both directions of one axis.
            speed = min(speed, 2 * chip.link)
        if inside > 1 and speed:
            reach = _reach(members, target)
            ici += times * wire_bytes(kind, nbytes, inside, reach) / speed
    return Roofline(
        compute=_seconds_of_products(flops, chip) / target.count,
        hbm=moved / chip.hbm_bandwidth if chip.hbm_bandwidth else 0.0,
        ici=ici,
        dcn=dcn,
    )


def _seconds_of_products(flops: StepFlops, chip: Chip) -> float:
    """Seconds in which one chip multiplies everything; 0 if its peak is not known.

    Products of bytes count as slow as all others where theirs is not.
    """
    if not chip.flops:
        return 0.0
    slow = (flops.total - flops.in_bytes) / chip.flops
    return slow + flops.in_bytes / (chip.int8_flops or chip.flops)


def predict(
    seconds: float,
    flops: StepFlops,
    tokens: int,
    steps: int | None,
    target: PlannedDevices,
) -> Prediction:
    """Speed and cost of a run whose every step takes `seconds`."""
    total = None if steps is None else seconds * steps
    busy = _seconds_of_products(flops, target.chip)
    needed = busy * flops.model / flops.total if flops.total else 0.0
    return Prediction(
        seconds=seconds,
        mfu=needed / (target.count * seconds) if seconds else 0.0,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        days=None if total is None else total / DAY,
        chip_hours=None if total is None else total / 3600 * target.count,
    )


def wire_bytes(kind: str, nbytes: float, n: int, reach: int = 0) -> float:
    """Bytes that the links of one device carry in one direction of a line or ring.

    An array of `nbytes` lies on n devices. A gather receives, and a scatter sends, the
    parts of the n - 1 other devices; an all-reduce does both. In an all-to-all on a
    torus each part travels a quarter of the way around each axis; `reach` is the sum
    of the lengths of these axes. (https://jax-ml.github.io/scaling-book/sharding.)
    """
    others = nbytes * (n - 1) / n
    carried = {
        "all-gather": others,
        "reduce-scatter": others,
        "all-reduce": 2 * others,
        "all-to-all": nbytes * reach / 4 if reach else others,
        "collective-permute": nbytes,
    }
    return look_up(carried, kind, "a collective")


def _reach(members: list[Any], target: PlannedDevices) -> int:
    """Sum of the lengths of torus axes along which devices differ; 0 for a switch."""
    axes = range(len(target.shape))
    extents = [len({d.coords[axis] for d in members}) for axis in axes]
    return sum(extent for extent in extents if extent > 1)


def _domain(device: Any, target: PlannedDevices) -> int:
    """The slice of a device; for chips without slices, its host."""
    if target.shape:
        return getattr(device, "slice_index", 0) or 0
    return device.process_index


def link_speed(members: list[Any], target: PlannedDevices) -> float:
    """Bytes/s at which data crosses a group of devices of one slice or host.

    Each torus axis along which they differ adds its links: two if it closes to a ring,
    one if it is a line. A group that skips devices gets a share of the links, because
    the skipped devices use them, too.
    """
    link = target.chip.link
    if not target.shape:
        return link
    coords = np.array([d.coords[: len(target.shape)] for d in members])
    speed = 0.0
    for axis, size in enumerate(target.shape):
        places = np.unique(coords[:, axis])
        if len(places) < 2:
            continue
        stride = int(np.diff(places).min())
        rounds = len(places) * stride == size and target.closes(axis)
        speed += link * (2 if rounds else 1) / stride
    return speed or math.inf
