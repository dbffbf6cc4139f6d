"""Matrices of experts in MXFP4, as GPT-OSS is published: exact in bfloat16.

OCP Microscaling Formats 1.0, section 5.3: 32 numbers of four bits (E2M1) share a scale
that is a power of two (E8M0). A tensor NAME lies as `NAME_blocks`, `[*stack, out,
in / 32, 16]` bytes of two numbers each, the low four bits first, and `NAME_scales`,
`[*stack, out, in / 32]`.
"""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, NOT_A_NUMBER = 127, 255


def _pairs_of_numbers() -> np.ndarray:
    """The two numbers of each byte, `[256, 2]`."""
    numbers = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], jnp.bfloat16)
    byte = np.arange(256)
    return np.stack([numbers[byte & 15], numbers[byte >> 4]], axis=1)


AGAIN = "download or write the model again"


def mxfp4_shapes(
    shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, tuple[int, ...]]:
    """By NAME, the shape `[*stack, in, out]` of each tensor that lies in two parts.

    `folder` has the files, and is named in errors.

    Raises:
      UserError: the parts of one do not fit each other.
    """
    found = {}
    for name, shape in shapes.items():
        own = name.removesuffix(BLOCKS)
        if own == name or own + SCALES not in shapes:
            continue
        scales = shapes[own + SCALES]
        if len(shape) < 3 or shape[-1] != BYTES or shape[:-1] != scales:
            raise UserError(
                f"{folder}: {name} is {list(shape)} and {own + SCALES} is "
                f"{list(scales)}: they must be [..., {BYTES}] and the same without the "
                f"last axis; {AGAIN}"
            )
        found[own] = (*shape[:-3], shape[-2] * 2 * BYTES, shape[-3])
    return found


def read_mxfp4(
    name: str, blocks: np.ndarray, scales: np.ndarray, file: Path
) -> np.ndarray:
    """The matrices as bfloat16 `[*stack, in, out]`, without rounding.

    `file` has `name`, and is named in errors.

    Raises:
      UserError: a part holds no bytes, or a scale that stands for no number.
    """
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
        raise UserError(
            f"{file}: the parts {BLOCKS} and {SCALES} of {name} are {blocks.dtype} and "
            f"{scales.dtype}, and MXFP4 has bytes (uint8); {AGAIN}"
        )
    if (scales == NOT_A_NUMBER).any():
        raise UserError(
            f"{file}: {name}{SCALES} holds {NOT_A_NUMBER}, which is no number; {AGAIN}"
        )
    numbers = _pairs_of_numbers()[blocks]
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)
    numbers *= powers.astype(jnp.bfloat16)[..., None, None]
    return numbers.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)
