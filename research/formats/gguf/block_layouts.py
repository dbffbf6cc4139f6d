"""The codes and scales in llama.cpp's blocks, as they lie in a file.

Layouts: ggml-common.h of https://github.com/ggml-org/llama.cpp. Neighbours lie in
different bytes: the first 16 of the 32 numbers of a block of Q4_0 have the low bits of
16 bytes. K-quants have blocks of 256, in which 16 or 32 share a scale that is a code.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from research.weights.quantized.block_kind import BlockKind, CodedMatrix

K_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Layout:
    """Blocks of one type.

    Attributes:
      kind: what the codes stand for.
      numbers: of a block.
      size: of a block in bytes.
      unpack: from `[n, size]` bytes to codes `[n, numbers]`, scales and offsets
        `[n, numbers / kind.block]`; no offsets are None.
    """

    kind: BlockKind
    numbers: int
    size: int
    unpack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


def unpack_blocks(layout: Layout, rows: np.ndarray) -> CodedMatrix:
    """The matrix that `rows`, bytes `[*stack, out, in * size / numbers]`, hold."""
    outer = rows.shape[:-1]
    blocks = np.ascontiguousarray(rows).reshape(-1, layout.size)
    codes, *scales = layout.unpack(blocks)
    scales, offsets = (
        None if x is None else np.ascontiguousarray(x).reshape(*outer, -1)
        for x in scales
    )
    return CodedMatrix(layout.kind, codes.reshape(*outer, -1), scales, offsets)


def _halves(blocks: np.ndarray, at: int, count: int = 1) -> np.ndarray:
    """`count` float16 numbers of each block from byte `at` on."""
    return np.ascontiguousarray(blocks[:, at : at + 2 * count]).view("<f2")


def _fields(bytes_: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The fields of `bits` bits: the low ones of `run` bytes, then the next higher."""
    runs = bytes_.reshape(len(bytes_), -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(len(bytes_), -1)


def _q8_0(b: np.ndarray) -> tuple[np.ndarray, ...]:
    # Signed bytes plus 128.
    return b[:, 2:] ^ np.uint8(128), _halves(b, 0), None


def _q4_0(b: np.ndarray) -> tuple[np.ndarray, ...]:
    return _fields(b[:, 2:], 4, 16), _halves(b, 0), None


def _q4_1(b: np.ndarray) -> tuple[np.ndarray, ...]:
    return _fields(b[:, 4:], 4, 16), _halves(b, 0), _halves(b, 2)


def _fifth_bits(b: np.ndarray, at: int) -> np.ndarray:
    """One bit for each of 32 numbers, from 4 bytes."""
    return np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q5_0(b: np.ndarray) -> tuple[np.ndarray, ...]:
    return _fields(b[:, 6:], 4, 16) | _fifth_bits(b, 2), _halves(b, 0), None


def _q5_1(b: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = _fields(b[:, 8:], 4, 16) | _fifth_bits(b, 4)
    return codes, _halves(b, 0), _halves(b, 2)


def _scales_and_minima(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and negative offsets of Q4_K and Q5_K, 8 each, from bytes 0 to 16."""
    low, middle, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]

    def six_bits(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        upper = (first >> 6) << np.uint8(4)
        return np.concatenate([first & np.uint8(63), rest | upper], 1)

    shared = _halves(b, 0, 2).astype(np.float32)
    scales = six_bits(low, high & np.uint8(15)).astype(np.float32)
    minima = six_bits(middle, high >> 4).astype(np.float32)
    return shared[:, :1] * scales, -(shared[:, 1:] * minima)


def _q4_k(b: np.ndarray) -> tuple[np.ndarray, ...]:
    return _fields(b[:, 16:], 4, 32), *_scales_and_minima(b)


def _q5_k(b: np.ndarray) -> tuple[np.ndarray, ...]:
    high = _fields(b[:, 16:48], 1, 32) << np.uint8(4)
    return _fields(b[:, 48:], 4, 32) | high, *_scales_and_minima(b)


def _q6_k(b: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = _fields(b[:, :128], 4, 64) | _fields(b[:, 128:192], 2, 32) << np.uint8(4)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, _halves(b, 208).astype(np.float32) * scales, None


def _q2_k(b: np.ndarray) -> tuple[np.ndarray, ...]:
    shared = _halves(b, 80, 2).astype(np.float32)
    scales = (b[:, :16] & np.uint8(15)).astype(np.float32)
    minima = (b[:, :16] >> 4).astype(np.float32)
    return (
        _fields(b[:, 16:80], 2, 32),
        shared[:, :1] * scales,
        -(shared[:, 1:] * minima),
    )


def _q3_k(b: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = _fields(b[:, 32:96], 2, 32) | _fields(b[:, :32], 1, 32) << np.uint8(2)
    low, high = _fields(b[:, 96:104], 4, 8), _fields(b[:, 104:108], 2, 4)
    scales = (low | high << np.uint8(4)).astype(np.float32) - 32
    return codes, _halves(b, 108).astype(np.float32) * scales, None


def _plain(name: str, bits: int, size: int, unpack: Callable) -> Layout:
    """Blocks of 32 with float16 scales; types with offsets have no zero."""
    ends_in_one = name.endswith("_1")
    zero = 0 if ends_in_one else 2 ** (bits - 1)
    offsets = "float16" if ends_in_one else ""
    kind = BlockKind(name, bits, 32, "float16", offsets, zero=zero)
    return Layout(kind, 32, size, unpack)


def _k(name: str, bits: int, block: int, size: int, unpack: Callable) -> Layout:
    """K-quants; the product of a scale with that of its block is exact in float32."""
    has_offsets = name in ("q2_k", "q4_k", "q5_k")
    zero, offsets = (0, "float32") if has_offsets else (2 ** (bits - 1), "")
    kind = BlockKind(name, bits, block, "float32", offsets, zero=zero)
    return Layout(kind, K_BLOCK, size, unpack)


# By llama.cpp's name of the type.
LAYOUTS = {
    layout.kind.name.upper(): layout
    for layout in (
        _plain("q8_0", 8, 34, _q8_0),
        _plain("q4_0", 4, 18, _q4_0),
        _plain("q4_1", 4, 20, _q4_1),
        _plain("q5_0", 5, 22, _q5_0),
        _plain("q5_1", 5, 24, _q5_1),
        _k("q2_k", 2, 16, 84, _q2_k),
        _k("q3_k", 3, 16, 110, _q3_k),
        _k("q4_k", 4, 32, 144, _q4_k),
        _k("q5_k", 5, 32, 176, _q5_k),
        _k("q6_k", 6, 16, 210, _q6_k),
    )
}
