"""Matrices of experts in MXFP4, as GPT-OSS is published: exact in bfloat16.

OCP Microscaling Formats 1.0, section 5.3: 32 numbers of four bits (E2M1) share a scale
that is a power of two (E8M0). A tensor NAME lies as `NAME_blocks`, `[*stack, out,
in / 32, 16]` bytes of two numbers each, the low four bits first, and `NAME_scales`,
`[*stack, out, in / 32]`.
"""

import functools

import jax.numpy as jnp
import numpy as np

from research.formats.huggingface.packed.packed_tensor import (
    PackedTensor,
    StoredParts,
)

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, NOT_A_NUMBER = 127, 255


def find_mxfp4(files: StoredParts) -> dict[str, PackedTensor]:
    """By NAME, every tensor `[*stack, in, out]` that lies in MXFP4.

    Raises:
      UserError: the parts of one do not fit each other.
    """
    found = {}
    for name, shape in files.shapes.items():
        own = name.removesuffix(BLOCKS)
        if own == name or own + SCALES not in files.shapes:
            continue
        scales = files.shapes[own + SCALES]
        if len(shape) < 3 or shape[-1] != BYTES or shape[:-1] != scales:
            raise files.damaged(
                f"{name} is {list(shape)} and {own + SCALES} is {list(scales)}: they "
                f"must be [..., {BYTES}] and the same without the last axis"
            )
        whole = (*shape[:-3], shape[-2] * 2 * BYTES, shape[-3])
        parts = name, own + SCALES
        read = functools.partial(_read, files, own)
        found[own] = PackedTensor("mxfp4", whole, parts, read)
    return found


def _read(files: StoredParts, own: str) -> np.ndarray:
    """The matrices as bfloat16 `[*stack, in, out]`, without rounding.

    Raises:
      UserError: a part holds no bytes, or a scale that stands for no number.
    """
    for part in (own + BLOCKS, own + SCALES):
        files.require(part, own, ("U8",))
    blocks, scales = files.read(own + BLOCKS), files.read(own + SCALES)
    if (scales == NOT_A_NUMBER).any():
        raise files.damaged(f"{own}{SCALES} holds {NOT_A_NUMBER}, which is no number")
    numbers = _pairs_of_numbers()[blocks]
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)
    numbers *= powers.astype(jnp.bfloat16)[..., None, None]
    return numbers.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


def _pairs_of_numbers() -> np.ndarray:
    """The two numbers of each byte, `[256, 2]`."""
    numbers = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], jnp.bfloat16)
    byte = np.arange(256)
    return np.stack([numbers[byte & 15], numbers[byte >> 4]], axis=1)
