"""Reads the schedule of a TPU program: what it waits for, and which weights it copies.

A compiled program lists the instructions of each computation in the order in which they
run. A collective is hidden if a matrix product, a kernel or a loop runs between its
start and its end. Whether that takes as long as the transfer is not known from a text.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Sequence

from jax.sharding import Mesh

from research.plan.compiled.collectives import read_collective
from research.plan.compiled.hlo_text import (
    HloComputation,
    HloExecution,
    HloInstruction,
    HloProgram,
    executions,
)
from research.plan.step_costs import Collective

PRODUCTS = ("convolution", "dot")
KERNEL = "tpu_custom_call"
# A fusion of these and of at least one of `MOVES` computes nothing.
MOVES = ("copy", "transpose")
STILL = ("parameter", "constant", "bitcast", "reshape", "slice", "dynamic-slice")
LEAST = 1 << 20  # bytes; a smaller copy of a weight is not listed


@dataclasses.dataclass(frozen=True)
class WeightCopy:
    """A copy of a weight, or of those of all layers, into another layout.

    Attributes:
      shape: of the result, as `bf16[4,4096,512]`.
      nbytes: of the result.
      times: how often a call of the program runs it.
    """

    shape: str
    nbytes: int
    times: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The collectives of a program that run beside computation, those that do not, and
    the copies of weights."""

    hidden: list[Collective]
    bare: list[Collective]
    copies: list[WeightCopy]


def read_schedule(
    program: HloProgram,
    mesh: Mesh,
    weights: Collection[Sequence[int]],
    unknown_trips: float = 1.0,
) -> Schedule:
    """Reads a program that was compiled for `mesh`, where its text is a schedule.

    Args:
      program: of one slice.
      mesh: its devices.
      weights: the shapes of parameters as a device holds them; those of a layer are
        found, too.
      unknown_trips: as of `executions`.
    """
    reader = _Reader(program)
    known = {_sizes(shape[first:]) for shape in weights for first in (0, 1)}
    found = Schedule([], [], [])
    for execution in executions(program, unknown_trips):
        collective = read_collective(execution, mesh)
        if collective is not None and len(collective.members) > 1:
            is_hidden = reader.is_hidden(execution)
            (found.hidden if is_hidden else found.bare).append(collective)
        elif not execution.fused and reader.moves(execution.instruction):
            found.copies.extend(_weight_copies(execution, known))
    return found


def _weight_copies(
    execution: HloExecution, known: Collection[tuple[int, ...]]
) -> Iterator[WeightCopy]:
    instruction = execution.instruction
    shapes = re.findall(r"\w+\[[\d,]*\]", instruction.shape)
    for shape, nbytes in zip(shapes, instruction.nbytes, strict=True):
        dims = [int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]
        if nbytes >= LEAST and _sizes(dims) in known:
            yield WeightCopy(shape, nbytes, execution.times)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of an array that a transposition or an axis of 1 does not change."""
    return tuple(sorted(n for n in shape if n > 1))


class _Reader:
    """Reads what each instruction of one program does."""

    def __init__(self, program: HloProgram):
        self._program = program
        self._opcodes = functools.cache(self._all_opcodes)

    def _all_opcodes(self, name: str) -> frozenset[str]:
        """The opcodes of a computation and of all that it runs; a kernel's is named."""
        found = set()
        for instruction in self._program.computations[name].values():
            is_kernel = instruction.attribute("custom_call_target") == KERNEL
            found.add(KERNEL if is_kernel else instruction.opcode)
            for called in instruction.runs:
                found |= self._opcodes(called)
        return frozenset(found)

    def _own_opcodes(self, instruction: HloInstruction) -> frozenset[str]:
        is_kernel = instruction.attribute("custom_call_target") == KERNEL
        own = {KERNEL if is_kernel else instruction.opcode}
        return frozenset(own).union(*map(self._opcodes, instruction.runs))

    def computes(self, instruction: HloInstruction) -> bool:
        """Whether it has a matrix product or a kernel, itself or in what it runs."""
        return not self._own_opcodes(instruction).isdisjoint((*PRODUCTS, KERNEL))

    def moves(self, instruction: HloInstruction) -> bool:
        """Whether it writes its operand in another order, and computes nothing."""
        if instruction.opcode in MOVES:
            return True
        if instruction.opcode != "fusion":
            return False
        inside = self._opcodes(instruction.runs[0])
        return inside <= {*MOVES, *STILL} and not inside.isdisjoint(MOVES)

    def is_hidden(self, execution: HloExecution) -> bool:
        """Whether something computes from a collective's start to its end."""
        order = list(execution.schedule.values())
        names = [each.name for each in order]
        first = names.index(execution.scheduled)
        first, last = self._ends(execution, order, first)
        between = order[first + 1 : last]
        if execution.fused and last > first:
            # A fusion that continues a transfer may compute beside it.
            between = order[first : last + 1]
        return any(map(self.computes, between))

    def _ends(
        self, execution: HloExecution, order: list[HloInstruction], first: int
    ) -> tuple[int, int]:
        """The places where a collective begins, and where its result is waited for."""
        scheduled = order[first]
        if scheduled.opcode.endswith("-start"):
            place, name = first, scheduled.name
            for later, other in enumerate(order[first:], first):
                if name in other.operands and other.opcode.endswith("-update"):
                    # A SparseCore is started before its operand is there.
                    place, name = later, other.name
                elif name in other.operands and other.opcode.endswith("-done"):
                    return place, later
        channel = execution.instruction.attribute("channel_id")
        if not execution.fused or not channel:
            return first, first
        parts = self._parts(id(execution.schedule), execution.schedule)
        return first, max(parts.get(channel, [first]))

    @functools.cached_property
    def _known_parts(self) -> dict[int, dict[str, list[int]]]:
        return {}

    def _parts(self, key: int, schedule: HloComputation) -> dict[str, list[int]]:
        """By channel, the places of the fusions that move its data."""
        if key in self._known_parts:
            return self._known_parts[key]
        found: dict[str, list[int]] = collections.defaultdict(list)
        for place, instruction in enumerate(schedule.values()):
            if instruction.opcode != "fusion":
                continue
            for inner in self._inner(instruction):
                if channel := inner.attribute("channel_id"):
                    found[channel].append(place)
        self._known_parts[key] = found
        return found

    def _inner(self, instruction: HloInstruction) -> Iterator[HloInstruction]:
        for called in instruction.runs:
            for inner in self._program.computations[called].values():
                yield inner
                yield from self._inner(inner)


def total(collectives: Collection[Collective]) -> float:
    """Their bytes, counted as in `Collective.nbytes`, over all runs."""
    return math.fsum(each.nbytes * each.times for each in collectives)
