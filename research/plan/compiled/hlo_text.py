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
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LINE = re.compile(r"^  (ROOT )?%[\w.\-]+ = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: XLA's name of the operation.
      nbytes: size of each array of the result, without the padding of its layout.
      operands: names of instructions in the same computation.
      inside: the text between the parentheses.
      attributes: the text after the parentheses.
      root: whether the instruction is its computation's result.
    """

    name: str
    opcode: str
    nbytes: tuple[int, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    def attribute(self, name: str) -> str:
        """The quoted or bare value of `name=`, or an empty string."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|([^\s,]+))', self.attributes)
        return (found[1] or found[2] or "") if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations it runs."""
        branches = _BRANCHES.search(self.attributes)
        more = _NAME.findall(branches[1]) if branches else []
        return _CALLED.findall(self.attributes) + more


HloComputation = dict[str, HloInstruction]


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """The computations of a program by name, and the name of the first one."""

    computations: dict[str, HloComputation]
    entry: str


@dataclasses.dataclass(frozen=True)
class HloExecution:
    """An instruction that runs `times` per step; `fused`: it is inside a fusion."""

    instruction: HloInstruction
    computation: HloComputation
    times: float
    fused: bool


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
        elif here is not None and _LINE.match(line):
            # A closing brace is no sign of a computation's end: the text of a kernel
            # may begin a line with one.
            instruction = _parse_line(line)
            here[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is no compiled program: it has no ENTRY")
    return HloProgram(computations, entry)


def _parse_line(line: str) -> HloInstruction:
    left, _, right = line.strip().partition(" = ")
    shape_end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    opening = right.index("(", shape_end)
    closing = _closing(right, opening)
    inside = right[opening + 1 : closing - 1]
    return HloInstruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=right[shape_end:opening].strip(),
        nbytes=_sizes(right[:shape_end]),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        attributes=right[closing:],
        root=left.startswith("ROOT "),
    )


def _closing(text: str, opening: int) -> int:
    """Index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _sizes(shape: str) -> tuple[int, ...]:
    """Bytes of each array in `(bf16[64,8]{1,0}, pred[])`; the dtype names its bits."""
    return tuple(
        math.ceil(int(bits or 8) * math.prod(int(n) for n in dims.split(",") if n) / 8)
        for _, bits, dims in _ARRAY.findall(shape)
    )


def executions(program: HloProgram, unknown_trips: float) -> Iterator[HloExecution]:
    """Yields every instruction that runs, and how often a step runs it.

    Args:
      program: the whole program.
      unknown_trips: iterations of loops whose number depends on the data.
    """

    def visit(name: str, times: float, fused: bool) -> Iterator[HloExecution]:
        computation = program.computations[name]
        for instruction in computation.values():
            yield HloExecution(instruction, computation, times, fused)
            inner = times
            if instruction.opcode == "while":
                trips = trip_count(program, computation, instruction)
                inner *= unknown_trips if trips is None else trips
            elif instruction.opcode.endswith(("-done", "-update")):
                continue  # The matching start was visited.
            for called in _running(instruction):
                yield from visit(called, inner, fused or instruction.opcode == "fusion")

    yield from visit(program.entry, 1.0, False)


def _running(instruction: HloInstruction) -> list[str]:
    """Computations it runs; a reducer of single numbers is not one of them."""
    if instruction.opcode == "while":
        return [_called_as(instruction, "body")]
    if instruction.opcode in ("fusion", "call", "async-start", "conditional"):
        return instruction.called
    return []


def _called_as(instruction: HloInstruction, role: str) -> str:
    return instruction.attribute(role).lstrip("%")


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
    condition = program.computations[_called_as(loop, "condition")]
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
    body = program.computations[_called_as(loop, "body")]
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
