"""The numbers in files, and what rounding to them does; written apart from the writers.

Q8_0 and Q4_0 store 32 numbers of a row as codes with one float16 scale
(https://github.com/ggml-org/llama.cpp, ggml-quants.c, `quantize_row_q8_0_ref` and
`quantize_row_q4_0_ref`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import ParityError

Array = jax.Array
# From the most exact to the least: significant bits of a number, or of a code.
KINDS = {"float32": 24, "float16": 11, "bfloat16": 8, "q8_0": 7, "q4_0": 3}
LARGEST_CODE = {"q8_0": 127, "q4_0": 8}
BLOCK = 32
# The distance of the smallest numbers of a kind.
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
FLOAT_NOISE = 2.0**-18  # A code is the rounded quotient of two numbers.
EXPONENT = 0x7F800000  # Its bits of a float32.


@dataclasses.dataclass(frozen=True)
class StoredNumbers:
    """How files hold a parameter.

    Attributes:
      kind: a key of `KINDS`.
      by_inputs: rows of the file run along the inputs of a matrix, not its outputs.
      shift: the file has the values plus this.
      is_update: the file has what is added to the base model's parameter.
    """

    kind: str
    by_inputs: bool = False
    shift: float = 0.0
    is_update: bool = False

    def require_exact(self, path: str, asked: str) -> None:
        """Raises ParityError: numbers of kind `asked` are more exact than these."""
        kinds = [*KINDS]
        if kinds.index(self.kind) > kinds.index(asked):
            raise ParityError(
                f"the written files hold {path} in {self.kind}, and {asked} was asked "
                "for: please report this, with the command"
            )


@dataclasses.dataclass(frozen=True)
class Axes:
    """How many axes of an array are stacked, and how many are inputs."""

    stacked: int
    n_in: int


def half_step(own: Array, numbers: StoredNumbers, axes: Axes) -> Array:
    """The furthest that a number may be from `own` when it was rounded to nearest.

    Half a unit in the last place. For codes it is half a step; where a scale is
    rounded to float16, as many times its error as the code says; and a whole step for
    the numbers of Q4_0 at the end that has no code of its own.
    """
    kind = numbers.kind
    if kind not in LARGEST_CODE:
        return _unit(own + numbers.shift, kind) / 2
    blocks = _blocks(own, numbers, axes)
    step = jnp.abs(blocks).max(-1, keepdims=True) / LARGEST_CODE[kind]
    lost = jnp.abs(_nearest(step, "float16") - step)
    codes = jnp.abs(blocks) / jnp.maximum(step, 1e-30)
    # Two numbers of a block may be the largest, and one of them has no code.
    last = codes > LARGEST_CODE[kind] - 0.5 if kind == "q4_0" else False
    bound = jnp.where(last, 1.0, 0.5) * step + (codes + 0.5) * lost
    bound += jnp.abs(blocks) * FLOAT_NOISE
    return _from_blocks(bound, own.shape, numbers, axes)


def rounded(own: Array, numbers: StoredNumbers, axes: Axes) -> Array:
    """`own`, float32, as files of these numbers give it back."""
    kind = numbers.kind
    if kind == "float32":
        return own
    if kind not in LARGEST_CODE:
        if numbers.shift:
            return _nearest(own + numbers.shift, kind) - numbers.shift
        return _nearest(own, kind).astype(kind)
    blocks = _blocks(own, numbers, axes)
    if kind == "q8_0":
        step = jnp.abs(blocks).max(-1, keepdims=True) / 127
        codes = jnp.round(blocks / jnp.maximum(step, 1e-30))
    else:
        largest = jnp.abs(blocks).argmax(-1, keepdims=True)
        step = jnp.take_along_axis(blocks, largest, -1) / -8
        codes = jnp.where(step == 0, 0.0, blocks / jnp.where(step == 0, 1.0, step))
        codes = jnp.clip(jnp.floor(codes + 0.5), -8, 7)
    return _from_blocks(codes * _nearest(step, "float16"), own.shape, numbers, axes)


def _unit(x: Array, kind: str) -> Array:
    """A unit in the last place of each number."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & EXPONENT
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.maximum(power * 2.0 ** (1 - KINDS[kind]), SMALLEST[kind])


def _nearest(x: Array, kind: str) -> Array:
    """`x` rounded to a kind, as float32: XLA may leave out two casts in a row."""
    unit = _unit(x, kind)
    return jnp.round(x / unit) * unit


def _blocks(x: Array, numbers: StoredNumbers, axes: Axes) -> Array:
    """`[*stack, rows, n, 32]`, in the order of the file's rows."""
    return _matrix(x, numbers, axes).reshape(
        *x.shape[: axes.stacked], -1, _row(x.shape, numbers, axes) // BLOCK, BLOCK
    )


def _matrix(x: Array, numbers: StoredNumbers, axes: Axes) -> Array:
    inputs, outputs = _sizes(x.shape, axes)
    x = x.reshape(*x.shape[: axes.stacked], inputs, outputs)
    return x.swapaxes(-1, -2) if numbers.by_inputs else x


def _from_blocks(
    blocks: Array, shape: tuple[int, ...], numbers: StoredNumbers, axes: Axes
) -> Array:
    x = blocks.reshape(*shape[: axes.stacked], -1, _row(shape, numbers, axes))
    return (x.swapaxes(-1, -2) if numbers.by_inputs else x).reshape(shape)


def _sizes(shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    middle = axes.stacked + axes.n_in
    return int(np.prod(shape[axes.stacked : middle])), int(np.prod(shape[middle:]))


def _row(shape: tuple[int, ...], numbers: StoredNumbers, axes: Axes) -> int:
    """The length of a row in the file."""
    return _sizes(shape, axes)[0 if numbers.by_inputs else 1]
