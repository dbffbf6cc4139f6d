"""The programs of a slot decoder: its state on the device and pure functions of it.

`SlotDecoder` compiles each function once. Axis letters: S slots, R rounds of one call,
T tokens of a chunk, V ids; L, K, C, H as in `cached_attention.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.engine.requests import Sampling
from research.engine.token_choice import (
    ChoiceState,
    choice_row,
    choose,
    log_probabilities,
)
from research.models.transformer import Cache, Model
from research.parallel.logit_rows import TopK
from research.weights.adapters import serving_bank

Array = jax.Array
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotRows:
    """All of the slots but keys and values; each array has a row for each slot.

    Attributes:
      length: int32 `[S]`, tokens in the cache.
      token: int32 `[S]`, the next input.
      active: bool `[S]`, slots that are answering.
      number: int32 `[S]`, new tokens so far.
      limit: int32 `[S]`, the most new tokens.
      scored, listed: bool `[S]`, whether log-probabilities are given, and those of the
        likeliest ids.
      adapter: int32 `[S]`, row of the bank.
      choice: how tokens are chosen.
    """

    length: Any
    token: Any
    active: Any
    number: Any
    limit: Any
    scored: Any
    listed: Any
    adapter: Any
    choice: ChoiceState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of the device: `Cache.k`, `Cache.v` and the rows."""

    k: Any
    v: Any
    rows: SlotRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of given or chosen ids.

    Attributes:
      logprobs: float32 `[T]`.
      top_ids, top_logprobs: `[T, MOST_ALTERNATIVES]`, the likeliest first; zeros unless
        they were requested.
    """

    logprobs: Any
    top_ids: Any
    top_logprobs: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
    """The tokens of one call of `decode`, R rounds of S slots.

    Attributes:
      ids: int32 `[R, S]`; -1 where a slot had no turn.
      scores: arrays `[R, S]` and `[R, S, MOST_ALTERNATIVES]`.
      active: bool `[S]`, slots that continue.
    """

    ids: Any
    scores: Scores
    active: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheBlock:
    """Keys and values of one chunk of a prompt, `[L, 1, K, CHUNK, H]` each.

    Those of a whole prompt have its length in place of the chunk's.
    """

    k: Any
    v: Any

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def empty(model: Model, slots: int, room: int) -> Slots:
    """The state of free slots with room for `room` tokens each."""
    cache, vocab = model.init_cache(slots, room), model.architecture.vocab
    row = free_row(choice_row(Sampling(), (), (), vocab))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (slots, *x.shape)), row)
    return Slots(cache.k, cache.v, rows)


def free_row(choice: ChoiceState, **values: Any) -> SlotRows:
    """The row of a slot that holds nothing, with some values of a request."""
    names = {field.name for field in dataclasses.fields(SlotRows)} - {"choice"}
    flags = dict.fromkeys(("active", "scored", "listed"), np.bool(False))
    return SlotRows(**dict.fromkeys(names, np.int32(0)) | flags | values, choice=choice)


def admit(slots: Slots, slot: Array, row: SlotRows) -> Slots:
    """Gives a slot to a request."""
    rows = jax.tree.map(lambda x, y: x.at[slot].set(y), slots.rows, row)
    return dataclasses.replace(slots, rows=rows)


def start(slots: Slots, slot: Array, token: Array) -> Slots:
    """Begins the answer of a slot with `token` as the next input."""
    rows = dataclasses.replace(
        slots.rows,
        token=slots.rows.token.at[slot].set(token),
        active=slots.rows.active.at[slot].set(True),
    )
    return dataclasses.replace(slots, rows=rows)


def constrain(slots: Slots, slot: Array, constrained: Array, allowed: Array) -> Slots:
    """Allows a slot's next token only the ids of a bitmask, if `constrained`."""
    choice = slots.rows.choice
    choice = dataclasses.replace(
        choice,
        constrained=choice.constrained.at[slot].set(constrained),
        allowed=choice.allowed.at[slot].set(allowed),
    )
    return dataclasses.replace(
        slots, rows=dataclasses.replace(slots.rows, choice=choice)
    )


def read_block(chunk: int, slots: Slots, slot: Array, index: Array) -> CacheBlock:
    """Keys and values of chunk `index` of a slot."""
    layers, _, kv_heads, _, width = slots.k.shape
    at, size = (0, slot, 0, index * chunk, 0), (layers, 1, kv_heads, chunk, width)
    k, v = (jax.lax.dynamic_slice(x, at, size) for x in (slots.k, slots.v))
    return CacheBlock(k, v)


def write_block(
    chunk: int,
    slots: Slots,
    slot: Array,
    index: Array,
    count: Array,
    block: CacheBlock,
) -> Slots:
    """Puts chunk `index` into a slot, which then ends after `count` tokens of it."""
    at, put = (0, slot, 0, index * chunk, 0), jax.lax.dynamic_update_slice
    length = slots.rows.length.at[slot].set(index * chunk + count)
    rows = dataclasses.replace(slots.rows, length=length)
    return Slots(put(slots.k, block.k, at), put(slots.v, block.v, at), rows)


def extend(
    model: Model,
    top_k: TopK,
    params: Params,
    slots: Slots,
    slot: Array,
    given_2T: Array,
    count: Array,
    scored: Array,
    listed: Array,
) -> tuple[Slots, Scores]:
    """Writes a chunk, and scores the ids that follow, if `scored`.

    Scoring is part of the one program, so what a chunk writes does not depend on it.

    Args:
      model: the decoder.
      top_k: as `jax.lax.top_k`.
      params: of the model; may hold a bank of adapters.
      slots: the state.
      slot: where the chunk goes.
      given_2T: ids, and the id after each.
      count: how many of them are no padding.
      scored: whether the ids after each are scored.
      listed: whether the likeliest ids are given, too.
    """
    rows, before = slots.rows, slots.rows.length
    params = serving_bank.rows(params, rows.adapter[slot][None])
    hidden, cache = model.decode(
        params, given_2T[:1], Cache(slots.k, slots.v, before), slot
    )

    def score(hidden_TD: Array) -> Scores:
        logits_TV = model.logits(params, hidden_TD)
        return Scores(*log_probabilities(logits_TV, given_2T[1], listed, top_k))

    scores = _if(scored, score, hidden[0])
    rows = dataclasses.replace(rows, length=before.at[slot].add(count))
    return Slots(cache.k, cache.v, rows), scores


def decode(
    model: Model,
    rounds: int,
    gather_head: Callable[[Params], Params],
    place: Callable[[Array], Array],
    top_k: TopK,
    params: Params,
    slots: Slots,
) -> tuple[Slots, Round]:
    """Takes a token for each active slot, `rounds` times or until none is active.

    Args:
      model: the decoder.
      rounds: R.
      gather_head: makes the head ready for all rounds.
      place: fixes the sharding of logits `[S, V]`.
      top_k: as `jax.lax.top_k`.
      params: of the model; may hold a bank of adapters.
      slots: the state.
    """
    params = {**params, **gather_head(model.head(params))}
    advance = functools.partial(_advance, model, place, top_k, params)
    shapes = jax.eval_shape(advance, 0, slots)[1]
    ids, scores = jax.tree.map(lambda x: jnp.zeros((rounds, *x.shape), x.dtype), shapes)

    def going(carry: Any) -> Array:
        index, slots, _ = carry
        return (index < rounds) & jnp.any(_turns(slots.rows, index))

    def one(carry: Any) -> Any:
        index, slots, results = carry
        slots, found = advance(index, slots)
        results = jax.tree.map(lambda x, y: x.at[index].set(y), results, found)
        return index + 1, slots, results

    carry = (0, slots, (ids - 1, scores))
    _, slots, (ids, scores) = jax.lax.while_loop(going, one, carry)
    return slots, Round(ids, scores, slots.rows.active)


def _turns(rows: SlotRows, index: Array | int) -> Array:
    """Slots that take a token in round `index`: a constraint allows only the next."""
    return rows.active & ((index == 0) | ~rows.choice.constrained)


def _advance(
    model: Model,
    place: Callable[[Array], Array],
    top_k: TopK,
    params: Params,
    index: Array,
    slots: Slots,
) -> tuple[Slots, tuple[Array, Scores]]:
    """One round: the next token of each slot whose turn it is, and -1 elsewhere."""
    rows, turn_S = slots.rows, _turns(slots.rows, index)
    params = serving_bank.rows(params, rows.adapter)
    hidden, cache = model.decode(
        params, rows.token[:, None], Cache(slots.k, slots.v, rows.length)
    )
    logits_SV = place(model.logits(params, hidden[:, 0]))
    ids_S = choose(rows.choice, logits_SV, rows.number, turn_S)
    listed = jnp.any(turn_S & rows.listed)
    scores = _if(
        jnp.any(turn_S & rows.scored),
        lambda x: Scores(*log_probabilities(x, ids_S, listed, top_k)),
        logits_SV,
    )
    number_S = rows.number + turn_S
    ended_S = jnp.any(rows.choice.stop_ids == ids_S[:, None], axis=1)
    ended_S |= number_S >= rows.limit
    counts = rows.choice.counts.at[jnp.arange(len(ids_S)), ids_S].add(
        turn_S.astype(jnp.int32)
    )
    rows = dataclasses.replace(
        rows,
        length=rows.length + turn_S,
        token=jnp.where(turn_S, ids_S, rows.token),
        active=rows.active & ~(turn_S & ended_S),
        number=number_S,
        choice=dataclasses.replace(rows.choice, counts=counts),
    )
    return Slots(cache.k, cache.v, rows), (jnp.where(turn_S, ids_S, -1), scores)


def _if(wanted: Array, function: Callable[[Array], Any], x: Array) -> Any:
    """`function(x)`, or zeros of its shapes."""
    shapes = jax.eval_shape(function, x)

    def zeros(_: Array) -> Any:
        return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

    return jax.lax.cond(wanted, function, zeros, x)
