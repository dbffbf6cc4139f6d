"""A compiled program's text as instructions, and how often each of them runs.

The text is what `jax.stages.Compiled.as_text()` gives, on TPU and on CPU. XLA's own
cost analysis counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
    "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LINE = re.compile(r"^  (ROOT )?%[\w.\-]+ = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """One array of an instruction's result.

    Attributes:
      nbytes: without the padding of its layout.
      fast: it lies in a TPU's vector memory, not in HBM.
    """

    nbytes: int
    fast: bool


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: as XLA writes it.
      arrays: of the result, a tuple's one after the other.
      operands: names of instructions of the same computation.
      inside: what stands between the parentheses.
      attributes: what follows them.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[ArrayShape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

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


Computation = dict[str, HloInstruction]


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """A program: its computations by name, and which of them is the first."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class HloExecution:
    """An instruction that runs `times` a step; `fused`: inside of a fusion."""

    instruction: HloInstruction
    computation: Computation
    times: float
    fused: bool


def parse(text: str) -> HloProgram:
    """Reads a whole program.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, here = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            here = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif here is not None and _LINE.match(line):
            # Nothing ends a computation: kernels carry texts with braces of their own.
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
        arrays=_parse_shape(right[:shape_end]),
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


def _parse_shape(text: str) -> tuple[ArrayShape, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        bits = DTYPE_BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
        size = math.prod(int(n) for n in dims.split(",") if n)
        arrays.append(ArrayShape(math.ceil(bits * size / 8), "S(1)" in layout))
    return tuple(arrays)


def executions(module: HloProgram, unknown_trips: float) -> Iterator[HloExecution]:
    """Every instruction that runs, and how often.

    Args:
      module: the program.
      unknown_trips: iterations of loops whose number only the data decide.
    """

    def visit(name: str, times: float, fused: bool) -> Iterator[HloExecution]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield HloExecution(instruction, computation, times, fused)
            inner = times
            if instruction.opcode == "while":
                trips = trip_count(module, computation, instruction)
                inner *= unknown_trips if trips is None else trips
            elif instruction.opcode.endswith(("-done", "-update")):
                continue  # What its start has run.
            for called in _running(instruction):
                yield from visit(called, inner, fused or instruction.opcode == "fusion")

    yield from visit(module.entry, 1.0, False)


def _running(instruction: HloInstruction) -> list[str]:
    """Of what it calls, what is more than one number's arithmetic."""
    if instruction.opcode == "while":
        return [_called_as(instruction, "body")]
    if instruction.opcode in ("fusion", "call", "async-start", "conditional"):
        return instruction.called
    return []


def _called_as(instruction: HloInstruction, role: str) -> str:
    return instruction.attribute(role).lstrip("%")


def trip_count(
    module: HloProgram, computation: Computation, loop: HloInstruction
) -> int | None:
    """Iterations of a `while`, or None where they are not a constant.

    CPU and GPU programs say it; on TPU it follows from the start of the counter and
    the bound it is compared with, both constants in loops that a scan has made.
    """
    known = re.search(r'"known_trip_count":(\{[^}]*\})', loop.attributes)
    if known:
        return int(json.loads(known[1])["n"])
    condition = module.computations[_called_as(loop, "condition")]
    compare = next(i for i in condition.values() if i.root)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, bound = compare.operands
    start = _constant(condition, counter, (computation, loop))
    end = _constant(condition, bound, (computation, loop))
    if start is None or end is None:
        return None
    return max(0, math.ceil((end - start) / _step(module, loop, condition[counter])))


def _step(module: HloProgram, loop: HloInstruction, counter: HloInstruction) -> int:
    """What a loop adds to its counter; XLA unrolls some of its own."""
    body = module.computations[_called_as(loop, "body")]
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
    computation: Computation,
    name: str,
    outside: tuple[Computation, HloInstruction] | None = None,
) -> int | None:
    """The integer that `name` is, followed through copies and a loop's start."""
    instruction = computation[name]
    if instruction.opcode == "constant":
        number = instruction.inside.strip()
        return int(number) if re.fullmatch(r"-?\d+", number) else None
    if instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
        return _constant(computation, instruction.operands[0], outside)
    if instruction.opcode == "get-tuple-element" and outside:
        before, loop = outside
        index = int(instruction.attribute("index"))
        start = before[loop.operands[0]]
        if start.opcode == "tuple":
            return _constant(before, start.operands[index])
    return None
