"""Exact causal attention over packed rows, with grouped key/value heads.

Legend of the axis letters used in names, here and in `transformer.py`:

    B batch   T query tokens   S key tokens   D embed   F mlp   V vocabulary
    N query heads   K key/value heads   G = N / K queries that share a key   H head_dim
"""

import functools

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
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
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


def blocked_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    block: int,
    offset: int | Array = 0,
) -> Array:
    """Causal attention within each document of a packed row, in plain XLA.

    Query i stands at index `offset + i` of the row that the keys fill, S >= offset
    + T, and must carry the segment of that key: it then sees itself at least.

    Queries go in blocks of `block` tokens and see only the keys up to their own
    block's end, so about half of the row's square is never computed; where
    `offset` is traced that end is not known and a block computes all keys. The
    backward pass makes the probabilities again from the saved normalizers (Dao
    2023, arXiv:2307.08691, section 3.1), so no `[T, S]` array is kept. Exact for
    any `block`.

    Returns:
      `[B, T, N, H]` in the dtype of `q_BTNH`.
    """
    static, traced = (offset, None) if isinstance(offset, int) else (None, offset)
    return _blocked(
        q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, traced, block, static
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blocked(
    q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, traced, block, static
):
    arrays = (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, traced)
    return _blocked_forward(*arrays, block, static)[0]


def _heads_first(x_BTNH: Array, kv_heads: int) -> Array:
    """`[B, T, N, H]` to `[B, K, G, T, H]`: one matrix a head."""
    batch, length, heads, width = x_BTNH.shape
    x = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 2, 3, 1, 4)


def _heads_last(x_BKGTH: Array) -> Array:
    batch, kv_heads, group, length, width = x_BKGTH.shape
    x = x_BKGTH.transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, kv_heads * group, width)


def _block_logits(q_BKGTH, k_BKSH, segments, offset, here, reach):
    """Scaled, masked float32 logits of the queries `here` and the keys they see."""
    q_segments_BT, k_segments_BS = segments
    logits = jnp.einsum(
        "BKGTH,BKSH->BKGTS",
        q_BKGTH[:, :, :, here] * q_BKGTH.shape[-1] ** -0.5,
        k_BKSH[:, :, :reach],
        preferred_element_type=jnp.float32,
    )
    order_TS = _index(offset, here)[:, None] >= jnp.arange(reach)[None, :]
    same_BTS = q_segments_BT[:, here, None] == k_segments_BS[:, None, :reach]
    return jnp.where((same_BTS & order_TS[None])[:, None, None], logits, MASKED)


def _index(offset: int | Array, here: slice) -> Array:
    """Where the queries `here` stand in their row; a constant if `offset` is one."""
    if isinstance(offset, int):
        return jnp.arange(offset + here.start, offset + here.stop)
    return offset + jnp.arange(here.start, here.stop)


def _blocks(queries: int, keys: int, block: int, static: int | None):
    """Of each block: the slice of its queries, and how many keys it must compute."""
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        yield slice(start, stop), keys if static is None else static + stop


def _blocked_forward(
    q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, traced, block, static
):
    segments = (q_segments_BT, k_segments_BS)
    q = _heads_first(q_BTNH, k_BSKH.shape[2])
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    outputs, normalizers = [], []
    offset = traced if static is None else static
    sizes = (q_BTNH.shape[1], k_BSKH.shape[1])
    for here, reach in _blocks(*sizes, block, static):
        logits = _block_logits(q, k, segments, offset, here, reach)
        # Every query sees itself: the largest logit is never the mask.
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            weights.astype(v.dtype),
            v[:, :, :reach],
            preferred_element_type=jnp.float32,
        )
        outputs.append((mixed / total).astype(q.dtype))
        normalizers.append(largest + jnp.log(total))
    output = _heads_last(jnp.concatenate(outputs, axis=3))
    normalizer = jnp.concatenate(normalizers, axis=3)
    return output, (q_BTNH, k_BSKH, v_BSKH, segments, traced, output, normalizer)


def _blocked_backward(block, static, residuals, d_output_BTNH):
    q_BTNH, k_BSKH, v_BSKH, segments, traced, output_BTNH, normalizer = residuals
    kv_heads = k_BSKH.shape[2]
    q, output, d_output = (
        _heads_first(x, kv_heads) for x in (q_BTNH, output_BTNH, d_output_BTNH)
    )
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    along = jnp.sum(
        d_output.astype(jnp.float32) * output.astype(jnp.float32), -1, keepdims=True
    )
    scale = q.shape[-1] ** -0.5
    d_q = []
    d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    offset = traced if static is None else static
    sizes = (q_BTNH.shape[1], k_BSKH.shape[1])
    for here, reach in _blocks(*sizes, block, static):
        logits = _block_logits(q, k, segments, offset, here, reach)
        weights = jnp.exp(logits - normalizer[:, :, :, here])
        d_weights = jnp.einsum(
            "BKGTH,BKSH->BKGTS",
            d_output[:, :, :, here],
            v[:, :, :reach],
            preferred_element_type=jnp.float32,
        )
        d_logits = weights * (d_weights - along[:, :, :, here]) * scale
        d_logits, weights = d_logits.astype(q.dtype), weights.astype(q.dtype)
        d_q.append(jnp.einsum("BKGTS,BKSH->BKGTH", d_logits, k[:, :, :reach]))
        into = functools.partial(jnp.einsum, "BKGTS,BKGTH->BKSH")
        d_k = d_k.at[:, :, :reach].add(into(d_logits, q[:, :, :, here]))
        d_v = d_v.at[:, :, :reach].add(into(weights, d_output[:, :, :, here]))
    d_k, d_v = (
        d.transpose(0, 2, 1, 3).astype(x.dtype)
        for d, x in ((d_k, k_BSKH), (d_v, v_BSKH))
    )
    d_q = _heads_last(jnp.concatenate(d_q, axis=3))
    return d_q, d_k, d_v, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
