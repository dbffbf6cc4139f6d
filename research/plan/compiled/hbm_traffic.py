"""Bytes that a compiled step reads from and writes to memory, by its instructions."""

import re
from collections.abc import Iterator

from research.plan.compiled.hlo_text import (
    Computation,
    HloInstruction,
    HloProgram,
    executions,
)

# These move nothing, or are counted where they began.
FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
    "conditional", "call", "after-all", "partition-id", "replica-id", "opt-barrier",
    "async-start",
))  # fmt: skip
RENAMES = frozenset(("bitcast", "copy", "reshape", "convert"))
SLICES = frozenset(("dynamic-slice", "slice", "gather"))


def count_bytes(module: HloProgram, unknown_trips: float = 1.0) -> float:
    """Reads and writes of a step, in bytes of one device.

    An instruction reads its operands and writes its result, a fusion those of the
    whole; of an array that it only slices or updates in place, the part it touches.
    What stays in a TPU's vector memory costs nothing.
    """
    return sum(
        execution.times * _touched(module, execution.instruction, execution.computation)
        for execution in executions(module, unknown_trips)
        if not execution.fused
    )


def _touched(
    module: HloProgram, instruction: HloInstruction, within: Computation
) -> float:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "fusion":
        return _touched_by_fusion(module, instruction, within)
    if opcode.endswith("-start"):
        # Its result names both ends of the transfer; the smaller one is moved.
        ends = [array for array in instruction.arrays[:2] if array.nbytes]
        moved = min((array.nbytes for array in ends), default=0)
        return moved * sum(not array.fast for array in ends)
    if opcode in SLICES:
        # Its result, read at one place and written at another.
        return sum(a.nbytes for a in instruction.arrays[:1]) * 2
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _slow(within[instruction.operands[-1 if opcode == "scatter" else 1]])
    if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    return _slow(instruction) + sum(_slow(x) for x in _operands(instruction, within))


def _operands(
    instruction: HloInstruction, within: Computation
) -> Iterator[HloInstruction]:
    return (within[name] for name in dict.fromkeys(instruction.operands))


def _slow(instruction: HloInstruction) -> int:
    return sum(array.nbytes for array in instruction.arrays if not array.fast)


def _touched_by_fusion(
    module: HloProgram, fusion: HloInstruction, within: Computation
) -> float:
    body = module.computations[fusion.called[0]]
    handed_on = _handed_on(fusion, body)
    read = sum(
        _read(module, body, index)
        for index, name in enumerate(fusion.operands)
        if index not in handed_on.values() and _slow(within[name])
    )
    return read + sum(
        _written(module, body, index, array.nbytes)
        for index, array in enumerate(fusion.arrays)
        if index not in handed_on and not array.fast
    )


def _handed_on(fusion: HloInstruction, body: Computation) -> dict[int, int]:
    """Results that are operands as they were: buffers of a collective under way."""
    under_way = ("AsyncCollectiveStart", '"flag_start"')
    if not any(word in i.attributes for i in body.values() for word in under_way):
        return {}
    pairs = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", fusion.attributes)
    found = re.findall(r"\{(\d*)\}: \((\d+)", pairs[1]) if pairs else []
    # The one that is done has no index: what it gathered counts here.
    return {int(out): int(operand) for out, operand in found if out}


def _read(module: HloProgram, body: Computation, index: int) -> float:
    """Of one operand of a fusion: the slices of it, or all."""
    parameter = next(
        i for i in body.values() if i.opcode == "parameter" and int(i.inside) == index
    )
    total = 0.0
    name = parameter.name
    for user in _users(body, name):
        at = user.operands.index(name)
        if user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            total += _read(module, inner, at)
        elif user.opcode in SLICES:
            total += user.nbytes
        elif user.opcode in RENAMES and _users(body, user.name):
            renamed = [u.opcode in SLICES for u in _users(body, user.name)]
            sliced = sum(u.nbytes for u in _users(body, user.name))
            total += sliced if all(renamed) else parameter.nbytes
        elif user.opcode != "dynamic-update-slice" or at != 0:
            total += parameter.nbytes
    return min(total, parameter.nbytes)


def _users(body: Computation, name: str) -> list[HloInstruction]:
    return [i for i in body.values() if name in i.operands]


def _written(module: HloProgram, body: Computation, index: int, nbytes: int) -> float:
    """One result of a fusion: the part that it updates in place, or all."""
    part = next(i for i in body.values() if i.root)
    if part.opcode == "tuple":
        part = body[part.operands[index]]
    while part.opcode in RENAMES:
        part = body[part.operands[0]]
    if part.opcode == "parameter":
        return 0
    if part.opcode == "dynamic-update-slice":
        return body[part.operands[1]].nbytes
    if part.opcode == "fusion" and len(part.arrays) == 1:
        return _written(module, module.computations[part.called[0]], 0, nbytes)
    return nbytes
