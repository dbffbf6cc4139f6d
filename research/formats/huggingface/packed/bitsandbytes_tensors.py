"""Matrices in four bits as bitsandbytes stores them, nested scales included.

A `Linear4bit` has in place of `NAME.weight`, a matrix `[out, in]`: its codes, row after
row, two in a byte, the first one in the high bits; `.absmax`, the scale of each
`blocksize` codes; `.quant_map`, the levels; and `.quant_state.bitsandbytes__nf4`, the
bytes of a JSON object with the shape (`QuantState.as_dict(packed=True)`). Nested scales
are codes themselves: `nested_quant_map[absmax] * nested_absmax + nested_offset`.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import numpy as np

from research.formats.huggingface.packed.packed_tensor import (
    FLOATS,
    PackedTensor,
    StoredParts,
)
from research.weights.quantized.block_codes import NF4_LEVELS
from research.weights.quantized.block_kind import BlockKind, CodedMatrix

STATE = ".quant_state.bitsandbytes__"
_FP4 = tuple(twelfths / 12 for twelfths in (0, 1 / 16, 8, 12, 4, 6, 2, 3))
# Its kernels have these built in, and do not look at the levels of a file.
LEVELS = {"nf4": NF4_LEVELS, "fp4": (*_FP4, *(-level for level in _FP4))}
DTYPES = {"float32": "", "float16": "float16", "bfloat16": "bfloat16"}
FIELDS = {"blocksize": int, "dtype": str, "shape": list}
NESTED_FIELDS = {"nested_blocksize": int, "nested_offset": (int, float)}
MOST_STATE = 2**16  # Bytes of a state: it has a handful of fields.


@dataclasses.dataclass(frozen=True)
class _State:
    """The fields of a quant state. `group` scales share one of their own; 0: none."""

    levels: str
    shape: tuple[int, int]
    block: int
    dtype: str
    group: int = 0
    offset: float = 0.0


def find_bitsandbytes(files: StoredParts) -> dict[str, PackedTensor]:
    """By name, every matrix that lies as bitsandbytes stores it.

    Raises:
      UserError: a part is missing, or does not fit the others.
    """
    found = {}
    for name in files.shapes:
        own, marked, levels = name.partition(STATE)
        if not marked:
            continue
        if levels not in LEVELS:
            raise files.damaged(f"{name}: {levels!r} is none of {', '.join(LEVELS)}")
        state = _read_state(files, name, levels)
        _check(files, own, state)
        ends = ("", ".absmax", ".quant_map", STATE + levels)
        nested = (".nested_absmax", ".nested_quant_map") if state.group else ()
        # Blocks run on from row to row: these parts of them lie in one row each.
        block = math.gcd(state.shape[1], state.block)
        kind = BlockKind(
            f"bitsandbytes_{levels}", 4, block, "float32", levels=LEVELS[levels],
            rounds_to=state.dtype,
        )  # fmt: skip
        found[own] = PackedTensor.of_codes(
            kind,
            state.shape,
            tuple(own + end for end in (*ends, *nested)),
            functools.partial(_codes, files, own, state, kind),
        )
    return found


def _read_state(files: StoredParts, name: str, levels: str) -> _State:
    shape = files.require(name, name.partition(STATE)[0], ("U8",))
    if math.prod(shape) > MOST_STATE:
        raise files.damaged(f"{name} has {math.prod(shape)} bytes")
    try:
        fields = json.loads(files.read(name).tobytes())
        wrong = _wrong_field(fields)
    except (ValueError, RecursionError):
        wrong = "no JSON object"
    if wrong:
        raise files.damaged(f"{name} has {wrong}")
    state = _State(
        levels, tuple(fields["shape"]), fields["blocksize"], DTYPES[fields["dtype"]]
    )
    if "nested_blocksize" in fields:
        group, offset = fields["nested_blocksize"], float(fields["nested_offset"])
        return dataclasses.replace(state, group=group, offset=offset)
    return state


def _wrong_field(fields: Any) -> str:
    """Which field is missing or malformed; empty if none is."""
    if not isinstance(fields, dict):
        return "no JSON object"
    nested = NESTED_FIELDS if any(key in fields for key in NESTED_FIELDS) else {}
    for key, types in (FIELDS | nested).items():
        value = fields.get(key)
        if not isinstance(value, types) or isinstance(value, bool):
            return f"{key} {value!r}"
    sizes = [fields["blocksize"], fields.get("nested_blocksize", 1), *fields["shape"]]
    if any(type(size) is not int or size < 1 for size in sizes):
        return f"a size among {sizes} that is not positive"
    if len(fields["shape"]) != 2:
        return f"shape {fields['shape']}, which is no matrix"
    if fields["dtype"] not in DTYPES:
        return f"dtype {fields['dtype']!r}"
    if not math.isfinite(fields.get("nested_offset", 0)):
        return f"nested_offset {fields['nested_offset']!r}"
    return ""


def _check(files: StoredParts, own: str, state: _State) -> None:
    """Checks types and sizes of all parts. Raises UserError."""
    count = math.prod(state.shape)
    stored = files.require(own, own, ("U8", "I8", *FLOATS))
    wide = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}[files.types[own]]
    if math.prod(stored) * wide != -(-count // (2 * wide)) * wide:
        raise files.damaged(
            f"{own} has {math.prod(stored) * wide} bytes, and its shape is "
            f"{list(state.shape)} in four bits"
        )
    blocks = -(-count // state.block)
    kinds = ("U8",) if state.group else FLOATS
    files.require(f"{own}.absmax", own, kinds, (blocks,))
    files.require(f"{own}.quant_map", own, ("F32",), (16,))
    if state.group:
        groups = -(-blocks // state.group)
        files.require(f"{own}.nested_absmax", own, ("F32",), (groups,))
        files.require(f"{own}.nested_quant_map", own, ("F32",), (256,))


def _codes(files: StoredParts, own: str, state: _State, kind: BlockKind) -> CodedMatrix:
    out, width = state.shape
    levels = np.array(kind.levels, np.float32)
    if not np.allclose(files.read(f"{own}.quant_map"), levels, rtol=0, atol=1e-6):
        raise files.damaged(f"{own}.quant_map holds other levels than {state.levels}")
    # A part of it may be stored as floats, for tools that move only those.
    packed = np.ascontiguousarray(files.read(own)).reshape(-1).view(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: out * width]
    scales = _scales(files, own, state)
    starts = np.arange(out * width // kind.block, dtype=np.int64) * kind.block
    return CodedMatrix(
        kind,
        codes.reshape(out, width),
        scales[starts // state.block].reshape(out, width // kind.block),
    )


def _scales(files: StoredParts, own: str, state: _State) -> np.ndarray:
    """One scale for each block, float32."""
    scales = files.read(f"{own}.absmax")
    if not state.group:
        return scales.astype(np.float32)
    levels = files.read(f"{own}.nested_quant_map")
    shared = np.repeat(files.read(f"{own}.nested_absmax"), state.group)
    return levels[scales] * shared[: len(scales)] + np.float32(state.offset)
