"""Reads the text of a compiled program: its instructions, and how often each runs.

`jax.stages.Compiled.as_text()` gives the text, for TPU and for CPU. It must be read
because XLA's own cost analysis counts the body of a loop once, not once per iteration.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
# The attribute with the computations that an instruction runs. The reducer of single
# numbers that a collective has is none of them.
_RUNS = {
    "while": "body",
    "fusion": "calls",
    "call": "to_apply",
    "async-start": "calls",
    "custom-call-start": "called_computations",  # a SparseCore's part of a TPU program
    "conditional": "branch_computations",
}
# The computations of these are one instruction of the schedule.
FUSES = ("fusion", "async-start", "custom-call-start")
# `  %name = shape opcode(operands), attributes`; a shape may be a tuple.
_LINE = re.compile(
    r"  (?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
    r"(?P<opcode>[\w\-]+)\((?P<inside>.*?)\)(?P<attributes>, .*)?$"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of a computation.

    Attributes:
      root: whether the instruction is its computation's result.
      shape: of the result, as `(bf16[64,8]{1,0}, pred[])`.
      inside, attributes: the text between the parentheses, and after them.
    """

    root: bool
    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of instructions in the same computation."""
        return _NAME.findall(self.inside)

    @property
    def nbytes(self) -> list[int]:
        """Size of each array of the result, without the padding of its layout."""
        sizes = []
        for _, bits, dims in _ARRAY.findall(self.shape):  # The dtype names its bits.
            count = math.prod(int(n) for n in dims.split(",") if n)
            sizes.append(math.ceil(int(bits or 8) * count / 8))
        return sizes

    def attribute(self, name: str) -> str:
        """The quoted or bare value of `name=`, or an empty string."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|([^\s,]+))', self.attributes)
        return (found[1] or found[2] or "") if found else ""

    @property
    def runs(self) -> list[str]:
        """Names of the computations it runs."""
        role = _RUNS.get(self.opcode)
        found = re.search(rf"\b{role}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return _NAME.findall(found[1]) if found else []


HloComputation = dict[str, HloInstruction]


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """The computations of a program by name, and the name of the first one."""

    computations: dict[str, HloComputation]
    entry: str


@dataclasses.dataclass(frozen=True)
class HloExecution:
    """An instruction that runs `times` per step; `fused`: it is inside a fusion.

    `scheduled` is its own name, or that of the fusion it is inside, and `schedule` the
    computation of that one, which runs in the order of its instructions.
    """

    instruction: HloInstruction
    computation: HloComputation
    times: float
    fused: bool
    scheduled: str
    schedule: HloComputation


def parse(text: str) -> HloProgram:
    """Reads a whole program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, HloComputation] = {}
    entry, here = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            here = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif here is not None and (found := _LINE.match(line)):
            # A closing brace is no sign of a computation's end: the text of a kernel
            # may begin a line with one.
            root, name, *texts = found.groups(default="")
            here[name] = HloInstruction(bool(root), name, *texts)
    if not entry:
        raise ValueError("the text is no compiled program: it has no ENTRY")
    return HloProgram(computations, entry)


def executions(program: HloProgram, unknown_trips: float) -> Iterator[HloExecution]:
    """Yields every instruction that runs, and how often a step runs it.

    `unknown_trips`: iterations of loops whose number depends on the data.
    """

    def visit(
        name: str, times: float, outer: tuple[str, HloComputation] | None
    ) -> Iterator[HloExecution]:
        computation = program.computations[name]
        for instruction in computation.values():
            at = outer or (instruction.name, computation)
            yield HloExecution(instruction, computation, times, bool(outer), *at)
            inner = times
            if instruction.opcode == "while":
                trips = trip_count(program, computation, instruction)
                inner *= unknown_trips if trips is None else trips
            elif instruction.opcode.endswith(("-done", "-update")):
                continue  # The matching start was visited.
            fuses = instruction.opcode in FUSES
            for called in instruction.runs:
                yield from visit(called, inner, at if outer or fuses else None)

    yield from visit(program.entry, 1.0, None)


def trip_count(
    program: HloProgram, computation: HloComputation, loop: HloInstruction
) -> int | None:
    """Iterations of a `while`, or None if they are not a constant.

    CPU and GPU programs state the number. On TPU it follows from the counter's start,
    its increment and the bound; all three are constants in the loop of a scan.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.attribute("condition").lstrip("%")]
    compare = next(i for i in condition.values() if i.root)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, bound = compare.operands
    start = _constant(condition, counter, (computation, loop))
    end = _constant(condition, bound, (computation, loop))
    if start is None or end is None:
        return None
    increment = _increment(program, loop, condition[counter])
    return max(0, math.ceil((end - start) / increment))


def _increment(
    program: HloProgram, loop: HloInstruction, counter: HloInstruction
) -> int:
    """The increment of the counter; above 1 where XLA has unrolled a loop."""
    body = program.computations[loop.runs[0]]
    root = next(i for i in body.values() if i.root)
    index = int(counter.attribute("index") or 0)
    if root.opcode != "tuple":
        return 1
    after = body[root.operands[index]]
    while after.opcode in ("copy", "bitcast"):
        after = body[after.operands[0]]
    if after.opcode != "add":
        return 1
    steps = [_constant(body, name, None) for name in after.operands]
    return next((n for n in steps if n), 1)


def _constant(
    computation: HloComputation,
    name: str,
    outside: tuple[HloComputation, HloInstruction] | None,
) -> int | None:
    """The integer that `name` stands for, through copies and into a loop's start."""
    instruction = computation[name]
    if instruction.opcode == "constant":
        number = instruction.inside.strip()
        return int(number) if re.fullmatch(r"-?\d+", number) else None
    if instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
        return _constant(computation, instruction.operands[0], outside)
    if instruction.opcode == "get-tuple-element" and outside:
        before, loop = outside
        start = before[loop.operands[0]]
        if start.opcode == "tuple":
            index = int(instruction.attribute("index"))
            return _constant(before, start.operands[index], None)
    return None
