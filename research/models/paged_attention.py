"""Attention of one new token a row by JAX's paged kernel for TPUs.

The kernel (Kwon et al. 2023, arXiv:2309.06180, section 4, in JAX's Pallas) reads of
each row only the pages that it has filled, while blocks in plain XLA are read as far
as the longest row goes. A slot lies in one piece, so its pages are numbers in order,
and the whole cache is given as it lies: no layer of it is copied. Axis letters as in
`cached_attention.py`.
"""

import math

import jax
import jax.numpy as jnp

from research.models.attention import ScoreRule

Array = jax.Array

PAGE = 128  # Tokens; divides the room of a slot.
PAGES_AT_A_TIME = 4
TILE = 128  # Numbers that a TPU holds side by side.


def can_attend_pages(new_BTNH: Array, cache_LSKCH: Array, rule: ScoreRule) -> bool:
    """Whether the kernel computes this: a new token a row, bfloat16, and no window.

    With float32 the kernel would round its products to bfloat16.
    """
    return (
        new_BTNH.shape[1] == 1
        and new_BTNH.dtype == cache_LSKCH.dtype == jnp.bfloat16
        and new_BTNH.shape[3] % TILE == 0
        and cache_LSKCH.shape[3] % PAGE == 0
        and not rule.window
        and rule.sinks is None
    )


def attend_pages(
    q_BTNH: Array,
    k_LSKCH: Array,
    v_LSKCH: Array,
    layer: Array,
    slot: Array,
    length_B: Array,
    softcap: float = 0.0,
) -> Array:
    """Attends from a scaled query to the keys at 0 to `length_B` of its slot.

    Each pair of a slot and a key/value head is a sequence of the kernel, with one head.

    Returns:
      `[B, 1, N, H]` in the dtype of `q_BTNH`.
    """
    # Only TPUs wait for the import.
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    batch, _, heads, width = q_BTNH.shape
    slots, kv_heads, room = k_LSKCH.shape[1:4]
    each = room // PAGE
    slot_B = layer * slots + slot + jnp.arange(batch)
    head_BK = slot_B[:, None] * kv_heads + jnp.arange(kv_heads)[None]
    pages = head_BK.reshape(-1, 1) * each + jnp.arange(each)[None]
    mixed = paged_attention(
        q_BTNH.reshape(batch * kv_heads, heads // kv_heads, width),
        k_LSKCH.reshape(1, -1, PAGE, width),
        v_LSKCH.reshape(1, -1, PAGE, width),
        jnp.repeat(length_B.astype(jnp.int32) + 1, kv_heads),
        pages.astype(jnp.int32),
        pages_per_compute_block=math.gcd(each, PAGES_AT_A_TIME),
        attn_logits_soft_cap=softcap or None,
    )
    return mixed.reshape(q_BTNH.shape)
