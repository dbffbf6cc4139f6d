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
        collective = read_collective(execution, mesh)
        if collective is not None and len(collective.members) > 1:
            found.append(collective)
    return found


def read_collective(execution: HloExecution, mesh: Mesh) -> Collective | None:
    """The collective that an instruction begins, for devices of `mesh`; else None."""
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
        shape, sizes, order = (
            [int(n) for n in x.split(",") if n] for x in tiled.groups("")
        )
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return ids.transpose(order or None).reshape(shape).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{((?:'\w+',?)+)\}", text)
    return _named_groups(*named.groups()) if named else [[]]


def _named_groups(axes: str, chosen: str) -> list[list[int]]:
    """Groups along the axes `'a','b'` of a mesh `'a'=4,'b'=2,'c'=1`."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    grouped = [[*sizes].index(name) for name in re.findall(r"'(\w+)'", chosen)]
    shape = [*sizes.values()]
    ids = np.arange(math.prod(shape)).reshape(shape)
    last = np.moveaxis(ids, grouped, range(-len(grouped), 0))
    return last.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


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
