"""Packed causal attention by the best kernel of a platform, behind one function.

Axis letters: see `attention.py`. All kernels compute the same function; `xla` runs
anywhere, and tests compare the others with it. Arrays are those of one device: on a
mesh the caller wraps the call in `jax.shard_map`, with `check_vma=False` for `splash`,
whose Pallas calls do not declare over which axes their outputs vary.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.config.choices import AUTO, KERNELS
from research.core.errors import UserError, look_up
from research.models import cudnn_attention
from research.models.attention import PLAIN, ScoreRule, blocked_attention
from research.models.cudnn_attention import pad_tokens

Array = jax.Array

# The best kernel by platform; on all others it is `xla`.
BEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}

# cuDNN's mask takes two bytes for each (query, key) pair of a device's rows; `cudnn`
# has room for it, too, for rows of many documents. Above this size `auto` prefers the
# blocked kernel, which keeps nothing that large.
CUDNN_MASK_BYTES = 2**31

# A TPU vector register has 128 lanes, and Splash takes only lengths that fill them.
# Two blocks of 512 and their scores fit the fast memory of every TPU since v4.
LANES, SPLASH_BLOCK = 128, 512


NO_SINKS = "it has no sinks, and each head of this model has one"


class KernelChoice(NamedTuple):
    """A kernel that works on the platform, and the reason for it, for the log."""

    kernel: str
    reason: str


def choose(
    kernel: str,
    platform: str,
    *,
    dtype: Any,
    head_dim: int,
    length: int,
    rows: int = 1,
    capability: str = "8.0",
    rule: ScoreRule = PLAIN,
) -> KernelChoice:
    """Picks the kernel of `packed_attention` for a platform.

    Args:
      kernel: the user's choice: one of `KERNELS`, or `auto`.
      platform: of the devices that will run it: `tpu`, `gpu`, `cuda`, `cpu`, ...
      dtype: of queries, keys and values.
      head_dim: width of one head.
      length: tokens of a whole row, over all shards of the context axis.
      rows: that a device holds in a forward pass.
      capability: of a GPU, `device.compute_capability`.
      rule: of the model's scores.

    Raises:
      UserError: an explicit `kernel` cannot work here.
    """
    rule = rule.within(length)
    best = BEST.get(platform, "xla")
    wanted = best if kernel == AUTO else kernel
    by_cudnn = functools.partial(
        _cudnn_lacks, platform, dtype, head_dim, capability, rule
    )
    found = {
        "xla": lambda: None,
        "cudnn": by_cudnn,
        "cudnn_mask": by_cudnn,
        "splash": lambda: _splash_lacks(platform, dtype, rule),
    }
    lacks = look_up(found, wanted, "config.model.attention")()
    note = ""
    if lacks is None and wanted == "cudnn":
        wanted, note = _cudnn_form(capability, rule)
    if kernel != AUTO:
        if lacks is None:
            return KernelChoice(wanted, f"set in the config{note}")
        raise UserError(
            f"attention kernel {kernel!r} cannot work here: {lacks}; "
            "use 'auto' or 'xla'"
        )
    mask = 2 * rows * length**2
    if best == "cudnn" and lacks is None and mask > CUDNN_MASK_BYTES:
        many = "one row" if rows == 1 else f"{rows} rows"
        lacks = f"its mask of {many} of {length} takes {mask / 2**30:.1f} GiB"
    if lacks is not None:
        return KernelChoice("xla", f"no {best}: {lacks}")
    only = "the only one" if best == "xla" else "the best"
    return KernelChoice(wanted, f"{only} on {platform}{note}")


def _cudnn_lacks(platform, dtype, head_dim, capability, rule) -> str | None:
    """The requirement of cuDNN's fused attention that is not met, or None.

    JAX 0.10 to 0.12 checks the same limits when it traces the call
    (`check_is_flash_attention`), but its messages do not say what to change.
    """
    version = re.match(r"(\d+)\.\d", capability)  # AMD's are such as gfx942.
    if BEST.get(platform) != "cudnn":
        return f"it needs an NVIDIA GPU, this is {platform}"
    if version is None:
        return f"it needs an NVIDIA GPU, this one is {capability}"
    major = int(version[1])
    if major < 8:
        return f"it needs compute capability 8.0 (Ampere), this GPU has {capability}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
    widest = 256 if major >= 9 else 128
    if head_dim % 8 or head_dim > widest:
        return f"head_dim must be a multiple of 8 up to {widest}, it is {head_dim}"
    if rule.softcap:
        return f"it cannot cap scores, and this model caps them at {rule.softcap:g}"
    return NO_SINKS if rule.sinks is not None else None


def _cudnn_form(capability: str, rule: ScoreRule) -> tuple[str, str]:
    """The kernel that `cudnn` is on a GPU that can run it, and why it is not itself."""
    without = cudnn_attention.lack_of_places(capability)
    if rule.window:
        without = f"layers see windows of {rule.window} tokens"
    if without:
        return "cudnn_mask", f"; documents as a mask: {without}"
    return "cudnn", ""


def _splash_lacks(platform, dtype, rule) -> str | None:
    if BEST.get(platform) != "splash":
        return f"it needs a TPU, this is {platform}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"it computes in bfloat16 or float32, not in {jnp.dtype(dtype)}"
    return NO_SINKS if rule.sinks is not None else None


def packed_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    *,
    kernel: str,
    block: int,
    offset: int | Array = 0,
    rule: ScoreRule = PLAIN,
    interpret: bool = False,
) -> Array:
    """Causal attention within each document of packed rows, with grouped heads.

    Query i stands at index `offset + i` of the row that the keys fill, S >= offset
    + T, and must carry the segment of that key. Padding is a document of its own:
    its outputs are finite and have no meaning.

    Args:
      kernel: one of `KERNELS`; `choose` finds one that works.
      block: tokens per block of `xla`; the others choose their own.
      offset: a Python int, or an int32 scalar if only the running program knows it (a
        shard of the context axis). `cudnn` is then `cudnn_mask`, which computes every
        pair of a query and a key; `xla` and `splash` still skip keys of the future.
      rule: a window, a soft cap, or neither. With a window `cudnn` is `cudnn_mask`;
        neither of the two can cap scores.
      interpret: runs `splash` without a TPU, slowly, for tests.

    Returns:
      `[B, T, N, H]` in the dtype of `q_BTNH`.
    """
    if isinstance(offset, int):
        # No query sees past the last one's own key.
        end = offset + q_BTNH.shape[1]
        k_BSKH, v_BSKH, k_segments_BS = (
            x[:, :end] for x in (k_BSKH, v_BSKH, k_segments_BS)
        )
    arrays = (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS)
    rule = rule.within(k_BSKH.shape[1])
    if kernel == "xla":
        return blocked_attention(*arrays, block, offset, rule)
    if rule.sinks is not None:
        raise ValueError(f"attention kernel {kernel!r} has no sinks")
    whole = isinstance(offset, int) and offset == 0 and not rule.window
    if kernel == "cudnn" and whole and cudnn_attention.bounds(q_BTNH.shape[1]):
        return cudnn_attention.placed(*arrays[:3], q_segments_BT)
    if kernel in ("cudnn", "cudnn_mask"):
        if rule.softcap:
            raise ValueError(f"attention kernel {kernel!r} cannot cap scores")
        return cudnn_attention.masked(*arrays, offset, rule.reach)
    if kernel == "splash":
        return _splash(*arrays, offset, rule, interpret)
    raise ValueError(f"no attention kernel {kernel!r}: it is one of {KERNELS}")


def _splash(
    q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, offset, rule, interpret
) -> Array:
    """The TPU kernel of `jax.experimental.pallas`, skipping unseen blocks."""
    width = q_BTNH.shape[-1]
    q, q_segments = pad_tokens(LANES, q_BTNH * width**-0.5, q_segments_BT)
    k, v, k_segments = pad_tokens(LANES, k_BSKH, v_BSKH, k_segments_BS)
    arrays = [x.transpose(0, 2, 1, 3) for x in (q, k, v)] + [q_segments, k_segments]

    def run(window: int, *arrays: Array) -> Array:
        return _splash_of_window(*arrays, offset, window, rule.softcap, interpret)

    if rule.windowed is None:
        mixed = run(rule.window, *arrays)
    else:
        # Splash must know the window when it is traced.
        forms = [functools.partial(run, window) for window in (rule.window, 0)]
        mixed = jax.lax.cond(rule.windowed, *forms, *arrays)
    return mixed.transpose(0, 2, 1, 3)[:, : q_BTNH.shape[1]]


def _splash_of_window(
    q, k, v, q_segments, k_segments, offset, window, softcap, interpret
) -> Array:
    """Splash on scaled queries with heads first; a window of 0 has no end."""
    # Pallas is slow to import, and no other kernel needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )

    queries, keys = q.shape[2], k.shape[2]
    block_q, block_k = (_splash_block(n) for n in (queries, keys))
    by_query, by_key = _schedule(offset, queries, keys, block_q, block_k, window)
    kernel = splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=None,
        mask_function=functools.partial(_sees, window) if window else _sees_all,
        interpret=interpret,
    )

    def row(q_NTH, k_KSH, v_KSH, q_segments_T, k_segments_S):
        segments = splash.SegmentIds(q_segments_T, k_segments_S)
        return kernel(q_NTH, k_KSH, v_KSH, segments)

    return jax.vmap(row)(q, k, v, q_segments, k_segments)


def _sees_all(q_index: Array, k_index: Array) -> Array:
    return q_index >= k_index


def _sees(window: int, q_index: Array, k_index: Array) -> Array:
    return (q_index >= k_index) & (q_index - k_index < window)


def _splash_block(length: int) -> int:
    sizes = range(LANES, SPLASH_BLOCK + 1, LANES)
    return max(size for size in sizes if length % size == 0)


def _schedule(offset, queries: int, keys: int, block_q: int, block_k: int, window: int):
    """The blocks that Splash computes, for its passes by query and its pass by key.

    Splash usually derives this from a mask while it is traced. A shard of the context
    axis knows its offset only while it runs, and Splash can read the schedule then.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as mask_info,
    )

    q_block, k_block = jnp.arange(queries // block_q), jnp.arange(keys // block_k)
    last_query = offset + (q_block + 1) * block_q - 1
    runs = last_query[:, None] >= (k_block * block_k)[None, :]
    if window:
        first_key = offset + q_block * block_q - window + 1
        runs &= first_key[:, None] < ((k_block + 1) * block_k)[None, :]
    # A skipped step names the block to fetch meanwhile, which is the next one to run:
    # the first key of the next queries, or the first query that sees these keys.
    next_k = jnp.where(runs, k_block[None, :], 0)
    next_q = jnp.where(runs, q_block[:, None], jnp.argmax(runs, axis=0)[None, :])
    index_T = (offset + jnp.arange(queries)).astype(jnp.int32)
    # Scalar memory is small, so the types are the smallest that Splash accepts.
    return tuple(
        mask_info.MaskInfo(
            data_next=following.astype(jnp.int16)[None],
            mask_next=None,
            block_mask=runs.astype(jnp.int8)[None],
            partial_mask_blocks=None,
            q_sequence=index_T,
        )
        for following in (next_k, next_q)
    )
