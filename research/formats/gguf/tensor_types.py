"""In which number format each tensor of a GGUF file is stored."""

from typing import Any

import numpy as np

from research.core.errors import UserError

# By the numbers that an export is to have: llama.cpp's name of the type.
TYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
}
BLOCK = 32  # Numbers that share one scale in Q8_0 and Q4_0.
LARGEST_SCALE = 65504.0  # The scale of a block is a float16.
STEPS = {"Q8_0": 127, "Q4_0": 8}
# Small tensors on which all others depend; llama.cpp computes with float32 there.
EXACT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")


def file_type(wanted: str) -> Any:
    """llama.cpp's name for a file whose matrices are mostly `wanted`, such as Q8_0."""
    import gguf

    prefix = "ALL" if wanted == "F32" else "MOSTLY"
    return gguf.LlamaFileType[f"{prefix}_{wanted}"]


def tensor_type(name: str, shape: tuple[int, ...], wanted: str) -> Any:
    """The `GGMLQuantizationType` of one tensor of a file.

    Args:
      name: in the file.
      shape: slowest axis first.
      wanted: one of TYPES.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or not name.endswith(".weight") or name.endswith(EXACT):
        return types.F32
    if wanted in STEPS and shape[-1] % BLOCK:
        return types.F16
    return types[wanted]


def stored_bytes(shape: tuple[int, ...], kind: Any) -> int:
    """The size of a tensor of this type in the file."""
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // numbers * size


def to_type(name: str, tensor: np.ndarray, kind: Any) -> np.ndarray:
    """Numbers, such as rows of a tensor, as the bytes of a type.

    Raises:
      UserError: a number is not finite, or becomes infinite.
    """
    import gguf

    tensor = np.ascontiguousarray(tensor, np.float32)
    largest = float(np.abs(tensor).max(initial=0.0))
    if not np.isfinite(largest):
        raise UserError(
            f"{name} holds numbers that are not finite; export an earlier step with "
            "--step"
        )
    if largest > _limit(kind.name):
        raise UserError(
            f"{name} holds {largest:g}, which is too large for {kind.name}; export "
            "with --dtype=bfloat16 or float32, and without --quant"
        )
    return np.ascontiguousarray(gguf.quantize(tensor, kind))


def _limit(kind: str) -> float:
    if kind in ("F32", "BF16"):
        return float(np.finfo(np.float32).max)
    return LARGEST_SCALE * STEPS.get(kind, 1)
