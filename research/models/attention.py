"""Exact causal attention over packed rows, with grouped key/value heads.

Legend of the axis letters used in names, here and in `transformer.py`:

    B batch   T query tokens   S key tokens   D embed   F mlp   V vocabulary
    N query heads   K key/value heads   G = N / K queries that share a key   H head_dim
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array

# Finite, so that a fully masked row (padding) gives a uniform softmax, not NaN.
MASKED = -1e30
BEYOND = 2**30  # Tokens; no row is that long.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """How the scores of a layer differ from plain causal ones.

    Attributes:
      window: tokens that a query sees, itself included; 0: all.
      softcap: c in c * tanh(score / c); 0: none.
      windowed: whether this layer has the window, a boolean scalar that only the
        running program knows; None: it has.
      sinks: float32 `[N]`, a score of each head that every softmax counts beside those
        of the keys, and that mixes no value in; None: none.
    """

    window: int = dataclasses.field(default=0, metadata={"static": True})
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})
    windowed: Array | None = None
    sinks: Array | None = None

    def within(self, keys: int) -> "ScoreRule":
        """The rule for rows of so many keys: a window of as many has no end."""
        if self.window < keys:
            return self
        return dataclasses.replace(self, window=0, windowed=None)

    @property
    def reach(self) -> Array | None:
        """The window as an int32 scalar, beyond any row where there is none."""
        if not self.window:
            return None
        window = jnp.int32(self.window)
        return (
            window
            if self.windowed is None
            else jnp.where(self.windowed, window, jnp.int32(BEYOND))
        )


PLAIN = ScoreRule()


def rule_partition(rule: ScoreRule, heads: Any) -> ScoreRule:
    """`PartitionSpec`s in the place of the arrays of `rule`; mesh axes of `heads`."""
    return jax.tree.map(
        lambda x: PartitionSpec(heads) if x.ndim else PartitionSpec(), rule
    )


def cap(scores: Array, softcap: float) -> Array:
    """`softcap * tanh(scores / softcap)`; no change where `softcap` is 0."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def blocked_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    block: int,
    offset: int | Array = 0,
    rule: ScoreRule = PLAIN,
) -> Array:
    """Causal attention within each document of a packed row, in plain XLA.

    Query i stands at index `offset + i` of the row that the keys fill, S >= offset
    + T, and must carry the segment of that key: it then sees itself at least. The
    tokens of a document lie beside each other.

    Queries and keys go in blocks of `block` tokens. A block of queries visits the
    blocks of keys from the start of its first document, or of the window of its first
    query, to its own end, so the cost follows the documents, not the square of the
    row. The softmax is accumulated over blocks, and computed again in the backward
    pass from the saved normalizers (Dao 2023, arXiv:2307.08691, section 3.1), so no
    `[T, S]` array is kept. The result is exact for any `block`: a masked key adds
    exactly zero, visited or not.

    Returns:
      `[B, T, N, H]` in the dtype of `q_BTNH`.
    """
    length, keys = q_BTNH.shape[1], k_BSKH.shape[1]
    block = min(block, length)
    # No document has a segment below zero, so padding and tokens never see each other.
    q, q_segments = _fill(block, q_BTNH, q_segments_BT, -1)
    k, k_segments = _fill(block, k_BSKH, k_segments_BS, -2)
    v, _ = _fill(block, v_BSKH, k_segments_BS, -2)
    rows = _Rows(
        q_segments,
        k_segments,
        jnp.asarray(offset, jnp.int32),
        rule.reach,
        *_visited(k_segments, length, keys, block, offset, rule.reach),
    )
    return _blocked(q, k, v, rule.sinks, rows, block, rule.softcap)[:, :length]


def start_of_softmax(q_BKGTH: Array, sinks_N: Array | None) -> tuple[Array, ...]:
    """The largest score, the sum of weights and the mix before the first key.

    A sink is a score that is there before it.
    """
    none = jnp.zeros((*q_BKGTH.shape[:-1], 1), jnp.float32)
    mixed = jnp.zeros(q_BKGTH.shape, jnp.float32)
    if sinks_N is None:
        return none + MASKED, none, mixed
    sinks = sinks_N.astype(jnp.float32).reshape(*q_BKGTH.shape[1:3], 1, 1)
    return none + sinks[None], none + 1.0, mixed


class _Rows(NamedTuple):
    """Positions of queries and keys, and the blocks of keys that a block visits."""

    q_segments: Array
    k_segments: Array
    offset: Array
    reach: Array | None
    first: Array
    end: Array


def _fill(block: int, x: Array, segments: Array, nobody: int) -> tuple[Array, Array]:
    more = -x.shape[1] % block
    x = jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)])
    return x, jnp.pad(segments, [(0, 0), (0, more)], constant_values=nobody)


def _visited(
    k_segments_BS: Array,
    length: int,
    keys: int,
    block: int,
    offset: int | Array,
    reach: Array | None,
) -> tuple[Array, Array]:
    """The first block of keys that each block of queries visits, and the end."""
    index = jnp.arange(k_segments_BS.shape[1])
    begins = jnp.diff(k_segments_BS, axis=1, prepend=k_segments_BS[:, :1]) != 0
    start_BS = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    first_query = offset + jnp.arange(0, length, block)
    first_key = jnp.min(jnp.take(start_BS, first_query, axis=1), axis=0)
    if reach is not None:
        first_key = jnp.maximum(first_key, first_query - reach + 1)
    return first_key // block, -(-jnp.minimum(first_query + block, keys) // block)


def _heads_first(x_BTNH: Array, kv_heads: int) -> Array:
    """`[B, T, N, H]` to `[B, K, G, T, H]`: one matrix for each head."""
    batch, length, heads, width = x_BTNH.shape
    x = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 2, 3, 1, 4)


def _heads_last(x_BKGTH: Array) -> Array:
    batch, kv_heads, group, length, width = x_BKGTH.shape
    x = x_BKGTH.transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, kv_heads * group, width)


def _part(x: Array, number: Array, block: int, axis: int) -> Array:
    """Block `number` of `x`; axis 2 of keys and 3 of queries with heads first."""
    return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis)


def _put(x: Array, part: Array, number: Array, block: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * block, axis)


def _logits(
    q_BKGTH: Array, k_BKSH: Array, rows: _Rows, i: Array, j: Array, softcap: float
) -> Array:
    """Masked float32 logits of the scaled queries of block i and the keys of j."""
    block = k_BKSH.shape[2]
    logits = jnp.einsum(
        "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
    )
    logits = cap(logits, softcap)
    index = jnp.arange(block)
    query_T1, key_1S = (
        (rows.offset + i * block + index)[:, None],
        (j * block + index)[None],
    )
    order_TS = query_T1 >= key_1S
    if rows.reach is not None:
        order_TS &= query_T1 - key_1S < rows.reach
    q_segments_BT = _part(rows.q_segments, i, block, 1)
    k_segments_BS = _part(rows.k_segments, j, block, 1)
    same_BTS = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    # The barrier has the mask made once. XLA's CPU compiler would otherwise compute it
    # again for every head, and in each use of the logits.
    seen_BTS = jax.lax.optimization_barrier(same_BTS & order_TS[None])
    return jnp.where(seen_BTS[:, None, None], logits, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocked(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    sinks_N: Array | None,
    rows: _Rows,
    block: int,
    softcap: float,
) -> Array:
    return _blocked_forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, rows, block, softcap)[0]


def _blocked_forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, rows, block, softcap):
    kv_heads, scale = k_BSKH.shape[2], q_BTNH.shape[-1] ** -0.5
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))

    def queries(i, carry):
        output, normalizer = carry
        q_block = _heads_first(_part(q_BTNH, i, block, 1) * scale, kv_heads)

        def keys(j, carry):
            largest, total, mixed = carry
            logits = _logits(q_block, _part(k, j, block, 2), rows, i, j, softcap)
            larger = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
            # Until a query reaches its first key, its weights are all one. The first
            # key that it does reach multiplies their sum by zero.
            weights, keep = jnp.exp(logits - larger), jnp.exp(largest - larger)
            total = total * keep + jnp.sum(weights, axis=-1, keepdims=True)
            mixed = mixed * keep + jnp.einsum(
                "BKGTS,BKSH->BKGTH",
                weights.astype(v.dtype),
                _part(v, j, block, 2),
                preferred_element_type=jnp.float32,
            )
            return larger, total, mixed

        largest, total, mixed = jax.lax.fori_loop(
            rows.first[i], rows.end[i], keys, start_of_softmax(q_block, sinks_N)
        )
        mixed = _heads_last((mixed / total).astype(q_BTNH.dtype))
        return (
            _put(output, mixed, i, block, 1),
            _put(normalizer, largest + jnp.log(total), i, block, 3),
        )

    batch, length, heads, _ = q_BTNH.shape
    each = (batch, kv_heads, heads // kv_heads, length, 1)
    empty = jnp.zeros_like(q_BTNH), jnp.zeros(each, jnp.float32)
    blocks = length // block
    output, normalizer = jax.lax.fori_loop(0, blocks, queries, empty)
    return output, (q_BTNH, k_BSKH, v_BSKH, sinks_N, rows, output, normalizer)


def _blocked_backward(block, softcap, residuals, d_output_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, rows, output_BTNH, normalizer = residuals
    kv_heads, scale = k_BSKH.shape[2], q_BTNH.shape[-1] ** -0.5
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    product = d_output_BTNH.astype(jnp.float32) * output_BTNH.astype(jnp.float32)
    along = _heads_first(jnp.sum(product, axis=-1, keepdims=True), kv_heads)
    mix = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def queries(i, carry):
        d_q, d_k, d_v = carry
        q_block = _heads_first(_part(q_BTNH, i, block, 1) * scale, kv_heads)
        d_block = _heads_first(_part(d_output_BTNH, i, block, 1), kv_heads)
        normalizer_block, along_block = (
            _part(x, i, block, 3) for x in (normalizer, along)
        )

        def keys(j, carry):
            d_q_block, d_k, d_v = carry
            k_block, v_block = _part(k, j, block, 2), _part(v, j, block, 2)
            logits = _logits(q_block, k_block, rows, i, j, softcap)
            weights = jnp.exp(logits - normalizer_block)
            d_weights = mix("BKGTH,BKSH->BKGTS", d_block, v_block)
            d_logits = weights * (d_weights - along_block)
            if softcap:  # The slope of tanh; masked logits have no weight anyway.
                d_logits *= 1.0 - (jnp.maximum(logits, -softcap) / softcap) ** 2
            d_logits = d_logits.astype(q_BTNH.dtype)
            weights = weights.astype(q_BTNH.dtype)
            d_q_block += mix("BKGTS,BKSH->BKGTH", d_logits, k_block)
            d_k_block = mix("BKGTS,BKGTH->BKSH", d_logits, q_block)
            d_v_block = mix("BKGTS,BKGTH->BKSH", weights, d_block)
            d_k = _put(d_k, _part(d_k, j, block, 2) + d_k_block, j, block, 2)
            d_v = _put(d_v, _part(d_v, j, block, 2) + d_v_block, j, block, 2)
            return d_q_block, d_k, d_v

        start = jnp.zeros(q_block.shape, jnp.float32), d_k, d_v
        d_q_block, d_k, d_v = jax.lax.fori_loop(rows.first[i], rows.end[i], keys, start)
        d_q_block = _heads_last((d_q_block * scale).astype(q_BTNH.dtype))
        return _put(d_q, d_q_block, i, block, 1), d_k, d_v

    empty = (
        jnp.zeros_like(q_BTNH), *(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    )  # fmt: skip
    blocks = q_BTNH.shape[1] // block
    d_q, d_k, d_v = jax.lax.fori_loop(0, blocks, queries, empty)
    d_k, d_v = (d.transpose(0, 2, 1, 3).astype(k.dtype) for d in (d_k, d_v))
    d_sinks = None
    if sinks_N is not None:
        # Its weight is that of a key whose value is zero.
        sinks = sinks_N.reshape(*normalizer.shape[1:3], 1, 1)
        weights = jnp.exp(sinks[None] - normalizer)
        d_sinks = -jnp.sum(weights * along, axis=(0, 3, 4))
        d_sinks = d_sinks.reshape(-1).astype(sinks_N.dtype)
    return d_q, d_k, d_v, d_sinks, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
