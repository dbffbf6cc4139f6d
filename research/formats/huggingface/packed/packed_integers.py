"""Matrices of integers with zeros and scales, as AWQ and GPTQ store them.

In place of `NAME.weight`, a matrix `[out, in]` of a `Linear`, lie `NAME.qweight`,
`NAME.qzeros` and `NAME.scales`, of int32 words whose low bits hold the first code. A
weight is `(code - zero) * scale`, rounded to the dtype of the scales.

AWQ (AutoAWQ, `WQLinear_GEMM`): words `[in, out / 8]` with the codes of eight outputs in
the order 0, 2, 4, 6, 1, 3, 5, 7; zeros `[groups, out / 8]` in that order, too.
GPTQ (AutoGPTQ, GPTQModel): words `[in / 8, out]` with the codes of eight inputs; zeros
`[groups, out / 8]` in their own order; `g_idx`, `[in]`, names the group of each input.
"""

import functools
import math
from collections.abc import Collection

import numpy as np

from research.formats.huggingface.packed.packed_tensor import (
    FLOATS,
    PackedTensor,
    StoredParts,
)
from research.formats.huggingface.packed.quantization_config import Packing
from research.weights.quantized.block_kind import BlockKind, CodedMatrix

WORDS, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = 32  # bits


def find_packed_integers(
    files: StoredParts, packing: Packing | None
) -> dict[str, PackedTensor]:
    """By name, every matrix that lies as AWQ or GPTQ store it.

    Raises:
      UserError: a part is missing, or does not fit the others; or `packing` does not
        say which of the two it is.
    """
    found = {}
    for name in files.shapes:
        if not name.endswith(WORDS):
            continue
        if packing is None or packing.method not in ("awq", "gptq"):
            raise files.damaged(
                f"{name} holds codes of AWQ or GPTQ, and config.json has no "
                "quantization_config that says which; write it there as "
                "quantize_config.json or quant_config.json of the model has it, or"
            )
        own = name.removesuffix(WORDS)
        find = _find_awq if packing.method == "awq" else _find_gptq
        found[f"{own}.weight"] = find(files, own, packing)
    return found


def _find_awq(files: StoredParts, own: str, packing: Packing) -> PackedTensor:
    count = WORD // packing.bits
    inputs, words = _two_axes(files, own + WORDS, own)
    group = inputs if packing.group == -1 else packing.group
    if inputs % group:
        raise files.damaged(f"{own}{WORDS} has {inputs} inputs in groups of {group}")
    _check_scales(files, own, inputs // group, words * count, packing)
    parts = tuple(own + end for end in (WORDS, ZEROS, SCALES))
    kind = _kind(files, own, packing, group)
    codes = functools.partial(_awq_codes, files, own, kind)
    return PackedTensor.of_codes(kind, (words * count, inputs), parts, codes)


def _awq_codes(files: StoredParts, own: str, kind: BlockKind) -> CodedMatrix:
    order = np.argsort(AWQ_ORDER)

    def unpacked(name: str) -> np.ndarray:
        fields = _fields(files.read(name), 4)
        return fields[..., order].reshape(len(fields), -1).T

    scales = files.read(own + SCALES).T
    return CodedMatrix(kind, unpacked(own + WORDS), scales, zeros=unpacked(own + ZEROS))


def _find_gptq(files: StoredParts, own: str, packing: Packing) -> PackedTensor:
    count = WORD // packing.bits
    words, out = _two_axes(files, own + WORDS, own)
    inputs = words * count
    group = inputs if packing.group == -1 else packing.group
    parts = [own + end for end in (WORDS, ZEROS, SCALES)]
    groups = _two_axes(files, own + SCALES, own, FLOATS)[0]
    if own + GROUPS in files.shapes:
        files.require(own + GROUPS, own, ("I32",), (inputs,))
        parts.append(own + GROUPS)
    elif groups != -(-inputs // group):
        raise files.damaged(
            f"{own}{SCALES} has {groups} groups, and {inputs} inputs in groups of "
            f"{group} are {-(-inputs // group)}"
        )
    if out % count:
        raise files.damaged(f"{own}{WORDS} has {out} outputs, no multiple of {count}")
    _check_scales(files, own, groups, out, packing)
    where = _group_of_inputs(files, own, inputs, group, groups)
    # Blocks as long as neighbours in one group allow; one input, if they are mixed.
    changes = np.flatnonzero(np.diff(where)) + 1
    kind = _kind(files, own, packing, math.gcd(inputs, *changes.tolist()))
    first = where[:: kind.block]
    codes = functools.partial(_gptq_codes, files, own, packing, kind, first)
    return PackedTensor.of_codes(kind, (out, inputs), tuple(parts), codes)


def _gptq_codes(
    files: StoredParts,
    own: str,
    packing: Packing,
    kind: BlockKind,
    groups: np.ndarray,
) -> CodedMatrix:
    """`groups` has that of each block."""
    fields = _fields(files.read(own + WORDS), packing.bits)
    codes = fields.transpose(1, 0, 2).reshape(fields.shape[1], -1)
    zeros = files.read(own + ZEROS)
    if packing.from_one:
        # Whole words: a zero of 0 has borrowed from its neighbour (GPTQModel,
        # `convert_gptq_v2_to_v1_format`).
        ones = sum(1 << at for at in range(0, WORD, packing.bits))
        zeros = (zeros.view(np.uint32) + np.uint32(ones)).view(np.int32)
    zeros = _fields(zeros, packing.bits).reshape(len(zeros), -1).T
    scales = files.read(own + SCALES).T
    return CodedMatrix(kind, codes, scales[:, groups], zeros=zeros[:, groups])


def _group_of_inputs(
    files: StoredParts, own: str, inputs: int, group: int, groups: int
) -> np.ndarray:
    """The group of each input, `[in]`."""
    if own + GROUPS not in files.shapes:
        return np.arange(inputs) // group
    where = files.read(own + GROUPS)
    if where.min() < 0 or where.max() >= groups:
        raise files.damaged(
            f"{own}{GROUPS} names groups {where.min()} to {where.max()}, and "
            f"{own}{SCALES} has {groups}"
        )
    return where


def _kind(files: StoredParts, own: str, packing: Packing, block: int) -> BlockKind:
    dtype = FLOATS[files.types[own + SCALES]]
    rounds_to = "" if dtype == "float32" else dtype
    return BlockKind(
        packing.method, packing.bits, block, dtype, zeros=True, rounds_to=rounds_to
    )


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in each word, uint8, as a last axis."""
    whole = np.ascontiguousarray(words, "<i4").view(np.uint8)
    parts = whole.reshape(*words.shape, WORD // 8, 1) >> np.arange(0, 8, bits, np.uint8)
    return (parts & np.uint8(2**bits - 1)).reshape(*words.shape, WORD // bits)


def _two_axes(
    files: StoredParts, name: str, own: str, types: Collection[str] = ("I32",)
) -> tuple[int, int]:
    shape = files.require(name, f"{own}.weight", types)
    if len(shape) != 2 or 0 in shape:
        raise files.damaged(f"{name} is {list(shape)}, and must have two axes")
    return shape[0], shape[1]


def _check_scales(
    files: StoredParts, own: str, groups: int, out: int, packing: Packing
) -> None:
    words = out * packing.bits // WORD
    files.require(own + ZEROS, f"{own}.weight", ("I32",), (groups, words))
    files.require(own + SCALES, f"{own}.weight", FLOATS, (groups, out))
