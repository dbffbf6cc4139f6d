"""Bytes that a compiled step reads from and writes to memory, by its instructions."""

from collections.abc import Iterator

from research.planning.hlo import Computation, Instruction, Module, executions

# These move nothing, or are counted where they began.
FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
    "conditional", "call", "after-all", "partition-id", "replica-id", "opt-barrier",
    "async-start",
))  # fmt: skip
SLICES = frozenset(("dynamic-slice", "slice", "gather", "slice-start"))


def count_bytes(module: Module, unknown_trips: float = 1.0) -> float:
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


def _touched(module: Module, instruction: Instruction, within: Computation) -> float:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "fusion":
        return _touched_by_fusion(module, instruction, within)
    if opcode in SLICES:
        # Its result, read at one place and written at another.
        return sum(a.nbytes for a in instruction.arrays[:1]) * 2
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _slow(within[instruction.operands[-1 if opcode == "scatter" else 1]])
    if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    return _slow(instruction) + sum(_slow(x) for x in _operands(instruction, within))


def _operands(instruction: Instruction, within: Computation) -> Iterator[Instruction]:
    return (within[name] for name in dict.fromkeys(instruction.operands))


def _slow(instruction: Instruction) -> int:
    return sum(array.nbytes for array in instruction.arrays if not array.fast)


def _touched_by_fusion(
    module: Module, fusion: Instruction, within: Computation
) -> float:
    body = module.computations[fusion.called[0]]
    parameters = {int(i.inside): i for i in body.values() if i.opcode == "parameter"}
    read = sum(
        _read(body, parameters[index])
        for index, name in enumerate(fusion.operands)
        if _slow(within[name])
    )
    return read + _written(body, fusion)


def _read(body: Computation, parameter: Instruction) -> float:
    """Of one operand of a fusion: the slices of it, or all."""
    users = [i for i in body.values() if parameter.name in i.operands]
    while len(users) == 1 and users[0].opcode in ("bitcast", "copy", "reshape"):
        again = users[0].name
        users = [i for i in body.values() if again in i.operands]
    if users and all(u.opcode in SLICES for u in users):
        return sum(u.nbytes for u in users)
    in_place = [u for u in users if u.opcode == "dynamic-update-slice"]
    if users and len(in_place) == len(users):
        return sum(0 if u.operands[0] == parameter.name else u.nbytes for u in users)
    return parameter.nbytes


def _written(body: Computation, fusion: Instruction) -> float:
    """The result of a fusion, but for what it hands on or updates in place."""
    root = next(i for i in body.values() if i.root)
    parts = [root]
    if root.opcode == "tuple":
        parts = [body[name] for name in root.operands]
    total = 0.0
    for part, array in zip(parts, fusion.arrays, strict=False):
        while part.opcode in ("bitcast", "copy", "convert") and part.operands:
            part = body[part.operands[0]]
        if array.fast or part.opcode == "parameter":
            continue
        if part.opcode == "dynamic-update-slice":
            total += body[part.operands[1]].nbytes
        else:
            total += array.nbytes
    return total
