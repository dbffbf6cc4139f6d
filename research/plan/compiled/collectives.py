"""Finds the collectives of a compiled step: kind, mesh axes, bytes, how often."""

import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from research.plan.compiled.hlo_text import (
    HloExecution,
    HloInstruction,
    HloProgram,
    executions,
)
from research.plan.step_costs import Collective

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip


def find_collectives(
    program: HloProgram, mesh: Mesh, unknown_trips: float = 1.0
) -> list[Collective]:
    """All collectives of a program that was compiled for `mesh`.

    With several slices, it is the program that runs on each of them. `unknown_trips`:
    iterations of loops whose number depends on the data.
    """
    found = []
    for execution in executions(program, unknown_trips):
        collective = _read(execution, mesh)
        if collective is not None and len(collective.members) > 1:
            found.append(collective)
    return found


def _read(execution: HloExecution, mesh: Mesh) -> Collective | None:
    instruction, times = execution.instruction, execution.times
    if instruction.opcode == "send":
        return _read_crossing(instruction, times, mesh)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or _continues(instruction):
        return None
    local = _first_slice(mesh)
    groups = _groups(instruction, len(local))
    nbytes = _payload(instruction)
    if kind == "reduce-scatter":
        nbytes *= len(groups[0]) or 1
    if kind == "all-reduce" and execution.fused and _scatters(execution):
        kind = "reduce-scatter"
    axes = _axes(groups, local, mesh)
    # Groups that cannot be read stay in the table, as any two devices along axis "?".
    members = tuple(int(local[i]) for i in groups[0]) or (0, 1)
    return Collective(kind, axes, nbytes, times, members)


def _continues(instruction: HloInstruction) -> bool:
    """Whether it is a later part of a collective that a TPU has in several fusions.

    In the first fusion `flag_start` is -1.
    """
    flag = re.search(r'"flag_start":"(-?\d+)"', instruction.attributes)
    return flag is not None and flag[1] != "-1"


def _scatters(execution: HloExecution) -> bool:
    """Whether it is a reduce-scatter, which TPUs fuse from all-reduce and slice."""
    name = execution.instruction.name
    return any(
        i.root and i.opcode == "dynamic-slice" and name in i.operands
        for i in execution.computation.values()
    )


def _payload(instruction: HloInstruction) -> int:
    """Bytes of the result, without the operand that an asynchronous start returns."""
    sizes = instruction.nbytes
    if instruction.opcode == "collective-permute-start":
        return sizes[1]
    if instruction.opcode == "all-gather-start":
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _first_slice(mesh: Mesh) -> np.ndarray:
    """Indices of the devices of the first slice, in the order of the program."""
    slices = [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]
    return np.flatnonzero(np.array(slices) == slices[0])


def _groups(instruction: HloInstruction, count: int) -> list[list[int]]:
    """Groups of devices of the program; one empty group if they cannot be read."""
    text = instruction.attributes
    # A permutation lists pairs of devices, one that sends and one that receives.
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{([{}\d,\s]*)\}", text)
    if listed:
        groups = re.findall(r"\{([\d,\s]+)\}", listed[1])
        return [[int(i) for i in g.split(",")] for g in groups] or [list(range(count))]
    tiled = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if tiled:
        shape = [int(n) for n in tiled[1].split(",")]
        return _iota(tiled[2], tiled[3]).reshape(shape).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}",
        text,
    )
    return _named_groups(*named.groups()) if named else [[]]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in `shape`, its axes in `order`: `4,2` and `1,0` transpose."""
    sizes = [int(n) for n in shape.split(",")]
    axes = [int(n) for n in order.split(",")] if order else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)


def _named_groups(axes: str, order: str | None, chosen: str) -> list[list[int]]:
    """Groups along axes of a mesh, or along parts of axes.

    Args:
      axes: the mesh, as `'a'=4,'b'=2`.
      order: of the devices, as `[4,2]T(1,0)` or a list; None for ascending numbers.
      chosen: `'a'`, or `'a':(2)2` for the part of size 2 that follows one of size 2.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    tiled = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order or "")
    if tiled:
        ids = _iota(*tiled.groups())
    elif order:
        ids = np.array([int(n) for n in order.split(",")])
    parts = {p[0]: p for p in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
    shape: list[int] = []
    grouped = []
    for name, size in sizes.items():
        _, before, here = parts.get(name, (name, str(size), "1"))
        grouped.append(len(shape) + 1)
        shape += [int(before or 1), int(here or size)]
        shape.append(size // shape[-2] // shape[-1])
    ids = np.moveaxis(ids.reshape(shape), grouped, range(-len(grouped), 0))
    return ids.reshape(-1, math.prod(shape[i] for i in grouped)).tolist()


def _axes(
    groups: Sequence[Sequence[int]], local: np.ndarray, mesh: Mesh
) -> tuple[str, ...]:
    """Mesh axes along which the devices of any group differ; `?` if unknown."""
    if not groups[0]:
        return ("?",)
    differing = np.zeros(mesh.devices.ndim, bool)
    for group in groups:
        where = np.unravel_index(local[np.array(group)], mesh.devices.shape)
        differing |= [len(set(coordinate.tolist())) > 1 for coordinate in where]
    return tuple(a for a, d in zip(mesh.axis_names, differing, strict=True) if d)


def _read_crossing(
    instruction: HloInstruction, times: float, mesh: Mesh
) -> Collective | None:
    """Reads a transfer between slices, which a TPU program delegates to its hosts."""
    kind = instruction.attribute("_xla_megascale_transfer_type")
    if not kind:
        return None
    slices = [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]
    members = tuple(slices.index(s) for s in sorted(set(slices)))
    axes = _axes([members], np.arange(mesh.size), mesh)
    kind = kind.lower().replace("_", "-")
    return Collective(kind, axes, instruction.nbytes[0], times, members)
