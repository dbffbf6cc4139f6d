"""Exact causal attention over packed rows, with grouped key/value heads.

Legend of the axis letters used in names, here and in `transformer.py`:

    B batch   T query tokens   S key tokens   D embed   F mlp   V vocabulary
    N query heads   K key/value heads   G = N / K queries that share a key   H head_dim
"""

import jax
import jax.numpy as jnp

from research.models.presets import Architecture, RopeScaling

Array = jax.Array

# Finite, so that a fully masked row (padding) gives a uniform softmax, not NaN.
MASKED = -1e30


def rope_frequencies(architecture: Architecture) -> Array:
    """Radians per token of each rotary pair, float32 `[H / 2]`.

    Su et al. 2021, arXiv:2104.09864, eq. 15, then `RopeScaling`.
    """
    half = architecture.head_dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / half
    frequency = 1.0 / architecture.rope_theta**exponent
    return _scale_frequencies(frequency, architecture.rope_scaling)


def _scale_frequencies(frequency: Array, scaling: RopeScaling) -> Array:
    if scaling.kind == "default":
        return frequency
    slowed = frequency / scaling.factor
    if scaling.kind == "linear":
        return slowed
    # llama3: 1 keeps a frequency, 0 slows it, linear in the turns it makes over
    # the original context in between.
    turns = scaling.original_max_position * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1.0 - keep) * slowed


def rope_tables(positions_BT: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosines and sines `[B, T, 1, H / 2]` in float32, made once for all layers."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Applies the rotary embedding; a pair is (i, i + H/2), as Hugging Face has it."""
    cos, sin = rope
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
    return turned.astype(x_BTNH.dtype)


def attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, allowed_BTS: Array) -> Array:
    """Softmax attention where `allowed_BTS` is true; softmax in float32.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al.
    2023, arXiv:2305.13245.

    Returns:
      `[B, T, N, H]` in the dtype of `q_BTNH`.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH * width**-0.5, k_BSKH)
    logits = jnp.where(allowed_BTS[:, None, None], logits.astype(jnp.float32), MASKED)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(q_BTNH.dtype)
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, v_BSKH)
    return mixed.reshape(batch, length, heads, width)


def packed_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    block: int,
) -> Array:
    """Causal attention within each document of a packed row.

    Queries go in blocks of `block` tokens and see only the keys up to their own
    block's end, so about half of the row's square is never computed. Exact for
    any `block`.
    """
    length = q_BTNH.shape[1]
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        order_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        same_BTS = segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
        outputs.append(
            attend(
                q_BTNH[:, start:stop],
                k_BTKH[:, :stop],
                v_BTKH[:, :stop],
                same_BTS & order_TS,
            )
        )
    return jnp.concatenate(outputs, axis=1)
