"""Attention of new tokens to the keys and values of the tokens before them.

The cache holds the rows of an engine, called slots, each filled to its own length.
Axis letters as in `attention.py`, and L layers, C tokens for which a slot has room.
A slot's number takes the place of the batch: row b of a call lies in slot `slot + b`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.models.attention import (
    MASKED,
    PLAIN,
    ScoreRule,
    cap,
    rule_partition,
    start_of_softmax,
)
from research.models.paged_attention import attend_pages, can_attend_pages
from research.parallel import mesh as meshes

Array = jax.Array

# Keys that are compared at a time: what a block has beyond a row's last key is wasted,
# and on a CPU a short block costs nothing else. Many rows go there in groups, whose
# longer blocks of keys fit into the cache of a core, each to the end of its longest
# row: 64 rows of 200 keys take three quarters of the time. A slot has room for whole
# blocks.
CPU_BLOCK, CPU_GROUP_BLOCK, ACCELERATOR_BLOCK = 64, 128, 512
CPU_GROUP = 16  # rows
ROOM = 128  # Divides the room of a slot; accelerators take no shorter blocks.
CACHE_AXES = ("layers", "batch", "kv_heads", "keys", "head_dim")


def room_for(length: int) -> int:
    """Tokens for which a slot must have room, to hold `length`: whole blocks."""
    return -(-length // ROOM) * ROOM


def attend_cached(
    q_BTNH: Array,
    new_k_BTKH: Array,
    new_v_BTKH: Array,
    k_LSKCH: Array,
    v_LSKCH: Array,
    layer: Array,
    slot: Array,
    length_B: Array,
    rule: ScoreRule = PLAIN,
    *,
    kept: Array | None = None,
    platform: str = "",
) -> tuple[Array, Array, Array]:
    """Writes keys and values of T new tokens a row, and attends to all up to each.

    Row b has `length_B[b]` tokens in slot `slot + b` already; its new ones follow.
    Keys go in blocks, whose softmax is accumulated (Dao 2023, arXiv:2307.08691,
    section 3.1), up to the end of the longest row, and in a layer with a window from
    the first key that any row sees: the cost follows what is filled. On a CPU that is
    so for each `CPU_GROUP` rows, where their number divides by it.
    A block in which a row sees nothing changes its result by exactly nothing, so a
    row's result does not depend on the lengths of the others. Where `kept` is false,
    the caches stay as they are, and the result means nothing. The platform "cpu"
    multiplies float32 twice as fast as bfloat16, conversion included; for "tpu" there
    is the kernel of `paged_attention`.

    Returns:
      `[B, T, N, H]`, and the caches of keys and values.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads, room = k_LSKCH.shape[2:4]
    cpu = platform == "cpu"
    rows = batch if batch % CPU_GROUP or not cpu else CPU_GROUP
    block = CPU_BLOCK if cpu else math.gcd(room, ACCELERATOR_BLOCK)
    if rows < batch:
        block = math.gcd(room, CPU_GROUP_BLOCK)
    dtype = jnp.float32 if cpu else q_BTNH.dtype
    rule = rule.within(room)
    start = layer, slot, length_B, kept, cpu
    k_LSKCH = _write(k_LSKCH, new_k_BTKH, *start)
    v_LSKCH = _write(v_LSKCH, new_v_BTKH, *start)
    q_BTNH *= width**-0.5
    if platform == "tpu" and can_attend_pages(q_BTNH, k_LSKCH, rule):
        at = layer, slot, length_B, rule.softcap
        return attend_pages(q_BTNH, k_LSKCH, v_LSKCH, *at), k_LSKCH, v_LSKCH
    grouped = (batch, length, kv_heads, heads // kv_heads, width)
    q_BKGTH = q_BTNH.reshape(grouped).transpose(0, 2, 3, 1, 4)

    position_BT = length_B[:, None] + jnp.arange(length)[None]
    given = (q_BKGTH, position_BT, k_LSKCH, v_LSKCH, layer, slot)
    mix = functools.partial(_mix, *given, rows, block, dtype, rule)
    if rows == batch:
        mixed_BKGTH = mix(0)
    else:
        parts = jax.lax.map(mix, jnp.arange(0, batch, rows))
        mixed_BKGTH = parts.reshape(q_BKGTH.shape)
    mixed_BTKGH = mixed_BKGTH.astype(q_BTNH.dtype).transpose(0, 3, 1, 2, 4)
    return mixed_BTKGH.reshape(q_BTNH.shape), k_LSKCH, v_LSKCH


def _mix(
    q_BKGTH: Array,
    position_BT: Array,
    k_LSKCH: Array,
    v_LSKCH: Array,
    layer: Array,
    slot: Array,
    rows: int,
    block: int,
    dtype: Any,
    rule: ScoreRule,
    first: Array | int,
) -> Array:
    """The values that `rows` rows from number `first` on see, mixed, in float32."""

    def read(number: Array) -> tuple[Array, Array]:
        at = (layer, slot + first, 0, number * block, 0)
        size = (1, rows, k_LSKCH.shape[2], block, k_LSKCH.shape[4])
        k, v = (jax.lax.dynamic_slice(x, at, size)[0] for x in (k_LSKCH, v_LSKCH))
        return k.astype(dtype), v.astype(dtype)

    q_BKGTH, position_BT = (
        jax.lax.dynamic_slice_in_dim(x, first, rows) for x in (q_BKGTH, position_BT)
    )
    return _accumulate(q_BKGTH.astype(dtype), position_BT, block, read, rule)


def _accumulate(
    q_BKGTH: Array,
    position_BT: Array,
    block: int,
    read: Callable[[Array], tuple[Array, Array]],
    rule: ScoreRule,
) -> Array:
    """The softmax of scaled queries over keys up to their positions, in float32."""
    mix = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    reach = rule.reach

    def visit(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, mixed = carry
        k_BKSH, v_BKSH = read(number)
        logits = cap(mix("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH), rule.softcap)
        index_S = number * block + jnp.arange(block)
        seen_BTS = index_S[None, None] <= position_BT[..., None]
        if reach is not None:
            seen_BTS &= position_BT[..., None] - index_S[None, None] < reach
        logits = jnp.where(seen_BTS[:, None, None], logits, MASKED)
        larger = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
        weights, keep = jnp.exp(logits - larger), jnp.exp(largest - larger)
        total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(v_BKSH.dtype)
        mixed = mixed * keep + mix("BKGTS,BKSH->BKGTH", weights, v_BKSH)
        return larger, total, mixed

    begin = start_of_softmax(q_BKGTH, rule.sinks)
    end = jnp.max(position_BT) // block + 1
    first: Array | int = 0
    if reach is not None:
        first = jnp.maximum(jnp.min(position_BT) - reach + 1, 0) // block
    _, total, mixed = jax.lax.fori_loop(first, end, visit, begin)
    return mixed / total


def _write(
    cache: Array,
    new_BTKH: Array,
    layer: Array,
    slot: Array,
    at_B: Array,
    kept: Array | None,
    cpu: bool,
) -> Array:
    """Puts the new tokens of each row behind those that its slot holds.

    A number that is not finite becomes zero. The row's own result shows it already,
    and the next request in the slot must not: 0 * NaN is not 0.
    """
    batch, length = new_BTKH.shape[:2]
    new = jnp.where(jnp.isfinite(new_BTKH), new_BTKH, 0).astype(cache.dtype)
    if not cpu:
        at_B = at_B if kept is None else jnp.where(kept, at_B, cache.shape[3])
        row_B = slot + jnp.arange(batch)
        at_BT = at_B[:, None] + jnp.arange(length)[None]
        head_K = jnp.arange(cache.shape[2])
        # Beyond the room nothing is written. Heads are among the indices, so that a
        # TPU writes rows of H as they lie: it would copy the cache to another layout.
        where = layer, row_B[:, None, None], head_K[None, None], at_BT[..., None]
        return cache.at[where].set(new, mode="drop")
    # A CPU would take a token at a time of the same update.
    new_BKTH = new.transpose(0, 2, 1, 3)
    for row in range(batch):
        where = (layer, slot + row, 0, at_B[row], 0)
        part = new_BKTH[None, row : row + 1]
        if kept is not None:
            old = jax.lax.dynamic_slice(cache, where, part.shape)
            part = jnp.where(kept, part, old)
        cache = jax.lax.dynamic_update_slice(cache, part, where)
    return cache


def cache_partition(mesh: Mesh, slots: int, kv_heads: int) -> PartitionSpec:
    """Slots over the batch axes and heads over `tensor`, each where it divides."""
    sizes = dict(zip(CACHE_AXES, (1, slots, kv_heads, 1, 1), strict=True))
    return meshes.partition_if_divisible(mesh, sizes)


def constrain_cached(mesh: Mesh, slots: int) -> Callable[[Array], Array]:
    """Fixes hidden states `[B, T, D]`: rows where their slots lie, all else whole.

    Otherwise the partitioner may split them like the weights, and copy them around.
    """

    def pin(x_BTD: Array) -> Array:
        whole = x_BTD.shape[0] != slots
        split = PartitionSpec(None if whole else cache_partition(mesh, slots, 1)[1])
        return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, split))

    return pin


def make_attend_cached(
    mesh: Mesh, slots: int, kv_heads: int
) -> Callable[..., tuple[Array, Array, Array]]:
    """Makes `attend_cached` of arrays that lie on `mesh`, split by `cache_partition`.

    Each device writes and reads its own slots and heads. A call of one row, into one
    slot, is computed by all; the devices that hold the slot keep it.
    """
    on_platform = functools.partial(
        attend_cached, platform=mesh.devices.flat[0].platform
    )
    if mesh.size == 1:
        return on_platform
    cache = cache_partition(mesh, slots, kv_heads)
    split, heads = cache[1], cache[2]
    here = slots // meshes.ways(mesh, split)

    def one_row(q, new_k, new_v, k, v, layer, slot, length, rule=PLAIN):
        slot = slot - jax.lax.axis_index(split) * here
        mine = (slot >= 0) & (slot < here)
        slot = jnp.clip(slot, 0, here - 1)
        at = layer, slot, length, rule
        mixed, k, v = on_platform(q, new_k, new_v, k, v, *at, kept=mine)
        return jax.lax.psum(jnp.where(mine, mixed, 0), split), k, v

    def attend(q_BTNH, *arrays):
        whole = split is None or q_BTNH.shape[0] == slots
        rows = PartitionSpec(split if whole else None, None, heads, None)
        everywhere = PartitionSpec()
        at = everywhere, everywhere, PartitionSpec(rows[0])
        rules = [rule_partition(rule, heads) for rule in arrays[7:]]
        return jax.shard_map(
            on_platform if whole else one_row,
            mesh=mesh,
            in_specs=(rows, rows, rows, cache, cache, *at, *rules),
            out_specs=(rows, cache, cache),
            check_vma=False,
        )(q_BTNH, *arrays)

    return attend
