"""Rotary position embeddings: Su et al. 2021, arXiv:2104.09864.

Axis letters: see `attention.py`, and R for the different embeddings of a model's
layers.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.models.architecture import Rope

Array = jax.Array
Tables = tuple[Array, Array]


def rope_frequencies(rope: Rope, head_dim: int, *, long_row: bool = False) -> Array:
    """Radians per token of each rotary pair, float32 `[fraction * H / 2]`.

    Eq. 15 of the paper, then `RopeScaling`.

    Args:
      rope: the embedding.
      head_dim: width of a head.
      long_row: rows are longer than `RopeScaling.original_max_position`.
    """
    half = int(head_dim * rope.fraction) // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / half
    frequency = 1.0 / rope.theta**exponent
    return _scale_frequencies(frequency, rope, long_row)


def _scale_frequencies(frequency: Array, rope: Rope, long_row: bool) -> Array:
    scaling = rope.scaling
    if scaling.kind == "default":
        return frequency
    if scaling.kind == "longrope":
        divisors = scaling.long if long_row else scaling.short
        return frequency / jnp.array(divisors, jnp.float32)
    slowed = frequency / scaling.factor
    if scaling.kind == "linear":
        return slowed
    if scaling.kind == "yarn":
        slow = _yarn_ramp(rope, len(frequency))
        return slow * slowed + (1.0 - slow) * frequency
    if scaling.kind != "llama3":
        raise ValueError(f"no rotary scaling {scaling.kind!r}")
    # `keep` is 1 for a frequency that stays and 0 for one that is slowed. In
    # between it is linear in the number of turns over the original context.
    turns = scaling.original_max_position * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1.0 - keep) * slowed


def _yarn_ramp(rope: Rope, half: int) -> Array:
    """0 for each pair whose frequency stays and 1 for each that is slowed.

    Section 3.2 of YaRN, in the numbers of pairs as its authors' code has it: the ramp
    rises linearly from pair to pair.
    """
    scaling = rope.scaling

    def pair(turns: float) -> float:
        """The pair, as a fraction, that turns so often over the original context."""
        wavelengths = scaling.original_max_position / (turns * 2 * math.pi)
        return half * math.log(wavelengths) / math.log(rope.theta)

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low or 0.001  # Two equal ends would divide by zero.
    return jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / width, 0.0, 1.0)


def rope_tables(positions_BT: Array, frequencies: Array, factor: float = 1.0) -> Tables:
    """Cosines and sines `[B, T, 1, H / 2]` in float32, multiplied by `factor`."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def tables_of_layers(
    ropes: Sequence[Rope | None], positions_BT: Array, head_dim: int, room: int
) -> Tables | None:
    """The tables that layers rotate by, made once for all of them.

    Args:
      ropes: of each layer.
      positions_BT: of the tokens.
      head_dim: width of a head.
      room: tokens that a row may hold. LongRoPE has other frequencies for rows beyond
        the original context, and all keys of a row must be turned by the same ones.

    Returns:
      None if no layer rotates; one pair of tables if all rotate alike; or else tables
      `[R, B, T, 1, H / 2]`, one for each of `distinct(ropes)`.
    """
    different = distinct(ropes)
    half = max((int(head_dim * r.fraction) // 2 for r in different if r), default=0)

    def tables(rope: Rope | None) -> Tables:
        if rope is None:  # An angle of zero turns nothing.
            return rope_tables(positions_BT, jnp.zeros(half, jnp.float32))
        long_row = room > rope.scaling.original_max_position
        frequencies = rope_frequencies(rope, head_dim, long_row=long_row)
        return rope_tables(positions_BT, frequencies, rope.scaling.attention_factor)

    if different == (None,):
        return None
    if len(different) == 1:
        return tables(different[0])
    cos, sin = zip(*map(tables, different), strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def distinct(ropes: Sequence[Rope | None]) -> tuple[Rope | None, ...]:
    """Each of `ropes` once, in the order of the layers that have it first."""
    return tuple(dict.fromkeys(ropes))


def rotate(x_BTNH: Array, rope: Tables | None, scale: float = 1.0) -> Array:
    """Applies the rotary embedding, and multiplies by `scale` before rounding.

    A pair is (i, i + half) of the part that turns, which is the first of a head, as in
    Hugging Face; the rest of a head stays.
    """
    if rope is None and scale == 1.0:
        return x_BTNH
    turned = x_BTNH.astype(jnp.float32)
    if rope is not None:
        cos, sin = rope
        width = 2 * cos.shape[-1]
        rest = turned[..., width:]
        turned = turned if width == x_BTNH.shape[-1] else turned[..., :width]
        low, high = jnp.split(turned, 2, axis=-1)
        parts = [low * cos - high * sin, high * cos + low * sin]
        turned = jnp.concatenate(
            parts if width == x_BTNH.shape[-1] else [*parts, rest], -1
        )
    turned = turned if scale == 1.0 else turned * scale
    return turned.astype(x_BTNH.dtype)
