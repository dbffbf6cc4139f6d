"""How the next token of each slot is chosen, inside a compiled program.

The order of the steps:

1. repetition penalty, over prompt and answer, as `RepetitionPenaltyLogitsProcessor` of
   transformers (Keskar et al. 2019, arXiv:1909.05858, section 4.1);
2. frequency and presence penalty, over the answer, as OpenAI's API reference;
3. logit bias;
4. stop ids are forbidden until `min_new` tokens are there, and all tokens that a
   constraint does not allow;
5. with a temperature of 0 the likeliest token, the lowest id of several; otherwise the
   logits are divided by it;
6. top-k, then top-p of what is kept, then min-p, in the order of transformers' warpers;
7. a draw, whose random numbers depend on the seed and the number of the token, not on
   the slot or on other slots.

A step that no active slot needs is skipped, and does nothing to a slot that does not
need it. Axis letters: S slots, V ids.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UserError
from research.engine.requests import (
    MOST_ALTERNATIVES,
    MOST_BIASES,
    MOST_STOP_IDS,
    Sampling,
)
from research.parallel.logit_rows import TopK

Array = jax.Array

# Stands in a list of ids for no id: updates beyond the vocabulary are dropped.
NO_ID = 2**31 - 1
# The logit of a stop id that comes too early: below all others, and above the -inf of a
# constraint, so that one that allows nothing but the end is obeyed.
TOO_EARLY = -1e30
# Ids among which one is drawn at a time.
DRAWN_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChoiceState:
    """How tokens are chosen; each array has a row for each slot.

    Attributes:
      temperature, top_p, min_p, repetition, frequency, presence: float32 `[S]`.
      top_k: int32 `[S]`; 0 is no limit.
      seed: uint32 `[S, 2]`, high word first.
      min_new: int32 `[S]`.
      stop_ids: int32 `[S, MOST_STOP_IDS]`.
      bias_ids, bias: int32 and float32 `[S, MOST_BIASES]`.
      in_prompt: bool `[S, V]`, ids of the prompt; read with a repetition penalty.
      counts: int32 `[S, V]`, how often the answer holds each id.
      constrained: bool `[S]`.
      allowed: uint32 `[S, ceil(V / 32)]`, a bit for each id, the lowest first.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    frequency: Any
    presence: Any
    top_k: Any
    seed: Any
    min_new: Any
    stop_ids: Any
    bias_ids: Any
    bias: Any
    in_prompt: Any
    counts: Any
    constrained: Any
    allowed: Any


def choice_row(
    sampling: Sampling, stop_ids: Iterable[int], prompt: Iterable[int], vocab: int
) -> ChoiceState:
    """The row of one request, as NumPy values.

    Args:
      sampling: of the request.
      stop_ids: ids that end the answer.
      prompt: its ids; read with a repetition penalty.
      vocab: V.

    Raises:
      UserError: too many stop ids or biases, or an id outside the vocabulary.
    """
    bias = {k: v for k, v in sampling.logit_bias.items() if v}
    for name, ids, most in (
        ("stop_ids", sorted(stop_ids), MOST_STOP_IDS),
        ("logit_bias", sorted(bias), MOST_BIASES),
    ):
        if len(ids) > most:
            raise UserError(f"{name}: {len(ids)} ids; at most {most} are possible")
        if ids and not 0 <= ids[0] <= ids[-1] < vocab:
            raise UserError(f"{name}: ids {ids} are not all in [0, {vocab})")
    in_prompt = np.zeros(vocab, bool)
    if sampling.repetition_penalty != 1:
        in_prompt[list(prompt)] = True
    seed = sampling.seed % 2**64
    return ChoiceState(
        temperature=np.float32(sampling.temperature),
        top_p=np.float32(sampling.top_p),
        min_p=np.float32(sampling.min_p),
        repetition=np.float32(sampling.repetition_penalty),
        frequency=np.float32(sampling.frequency_penalty),
        presence=np.float32(sampling.presence_penalty),
        top_k=np.int32(sampling.top_k),
        seed=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        min_new=np.int32(sampling.min_new_tokens),
        stop_ids=_padded(stop_ids, MOST_STOP_IDS, np.int32, NO_ID),
        bias_ids=_padded(bias, MOST_BIASES, np.int32, NO_ID),
        bias=_padded(bias.values(), MOST_BIASES, np.float32, 0),
        in_prompt=in_prompt,
        counts=np.zeros(vocab, np.int32),
        constrained=np.bool(False),
        allowed=np.zeros(-(-vocab // 32), np.uint32),
    )


def _padded(values: Iterable[Any], size: int, dtype: Any, rest: Any) -> np.ndarray:
    found = np.full(size, rest, dtype)
    values = list(values)
    found[: len(values)] = values
    return found


def choose(
    state: ChoiceState, logits_SV: Array, number_S: Array, active_S: Array
) -> Array:
    """The next ids, int32 `[S]`, from float32 logits; those of free slots mean nothing.

    Args:
      state: of the slots.
      logits_SV: of the model.
      number_S: tokens that each answer has so far.
      active_S: slots that are answering.
    """

    penalties = (state.repetition, 1.0), (state.frequency, 0.0), (state.presence, 0.0)
    changes = (
        (
            functools.reduce(jnp.logical_or, (x != y for x, y in penalties)),
            lambda x: _penalise(x, state),
        ),
        (jnp.any(state.bias != 0, axis=1), lambda x: _bias(x, state)),
        (
            number_S < state.min_new,
            lambda x: _at(x, state.stop_ids).set(TOO_EARLY, mode="drop"),
        ),
        (state.constrained, lambda x: _constrain(x, state.allowed)),
    )
    warmer_S = state.temperature > 0

    def changed(logits_SV: Array) -> Array:
        logits_SV = _where_needed(changes, logits_SV, active_S)
        ids_S = _likeliest(logits_SV)
        draw = functools.partial(_drawn, logits_SV, state, number_S, active_S)
        return _where_needed([(warmer_S, draw)], ids_S, active_S)

    needed_S = functools.reduce(jnp.logical_or, (needs for needs, _ in changes))
    return jax.lax.cond(
        jnp.any((needed_S | warmer_S) & active_S), changed, _likeliest, logits_SV
    )


def _likeliest(logits_SV: Array) -> Array:
    """The lowest id of the largest logits; an eighth of `argmax`'s time on a CPU."""
    largest = jnp.max(logits_SV, axis=-1, keepdims=True)
    vocab = logits_SV.shape[1]
    ids = jnp.arange(vocab, dtype=jnp.int32)[None]
    # No number equals one that is not a number.
    return jnp.min(jnp.where(logits_SV == largest, ids, vocab - 1), axis=-1)


def _where_needed(
    changes: Iterable[tuple[Array, Callable[[Array], Array]]], x: Array, active_S: Array
) -> Array:
    """`x` `[S, ...]`, changed for the active slots that need it, one step at a time."""
    for needs_S, change in changes:
        needs_S &= active_S
        rows = jnp.expand_dims(needs_S, range(1, x.ndim))
        x = jax.lax.cond(
            jnp.any(needs_S),
            lambda x, rows=rows, change=change: jnp.where(rows, change(x), x),
            lambda x: x,
            x,
        )
    return x


def _drawn(
    logits_SV: Array, state: ChoiceState, number_S: Array, active_S: Array, _: Array
) -> Array:
    # Only differences to the largest count, so that no small temperature overflows.
    below_SV = logits_SV - jnp.max(logits_SV, axis=-1, keepdims=True)
    temperature_S = jnp.where(state.temperature > 0, state.temperature, 1.0)
    changes = (
        (state.top_k > 0, lambda x: _top_k(x, state.top_k)),
        (state.top_p < 1, lambda x: _top_p(x, state.top_p)),
        (state.min_p > 0, lambda x: _min_p(x, state.min_p)),
    )
    kept_SV = _where_needed(changes, below_SV / temperature_S[:, None], active_S)
    return jax.vmap(_draw)(state.seed, number_S, kept_SV)


def log_probabilities(
    logits_TV: Array,
    ids_T: Array,
    alternatives: Array,
    top_k: TopK = jax.lax.top_k,
) -> tuple[Array, Array, Array]:
    """Scores of ids under the model itself, natural logarithms in float32.

    All values come from one array: an id among the likeliest has the same one in both.

    Args:
      logits_TV: of the model, unchanged.
      ids_T: one id for each row.
      alternatives: scalar bool: list the likeliest ids, too.
      top_k: as `jax.lax.top_k`.

    Returns:
      Values `[T]`; ids and values `[T, MOST_ALTERNATIVES]`, the likeliest first, or
      zeros.
    """
    scores_TV = jax.nn.log_softmax(logits_TV, axis=-1)
    chosen_T = jnp.take_along_axis(scores_TV, ids_T[:, None], axis=1)[:, 0]
    count = min(MOST_ALTERNATIVES, logits_TV.shape[1])
    none = jax.eval_shape(lambda x: top_k(x, count), scores_TV)
    top, top_ids = jax.lax.cond(
        alternatives,
        lambda x: tuple(top_k(x, count)),
        lambda x: tuple(jnp.zeros(y.shape, y.dtype) for y in none),
        scores_TV,
    )
    return chosen_T, top_ids, top


def _at(x_SV: Array, ids: Array) -> Any:
    """The places of a list of ids for each slot, to be updated."""
    return x_SV.at[jnp.arange(x_SV.shape[0])[:, None], ids]


def _penalise(logits_SV: Array, state: ChoiceState) -> Array:
    held = state.in_prompt | (state.counts > 0)
    factor = jnp.where(held, state.repetition[:, None], 1.0)
    logits_SV = jnp.where(logits_SV > 0, logits_SV / factor, logits_SV * factor)
    often = state.frequency[:, None] * state.counts
    return logits_SV - often - state.presence[:, None] * (state.counts > 0)


def _bias(logits_SV: Array, state: ChoiceState) -> Array:
    return _at(logits_SV, state.bias_ids).add(state.bias, mode="drop")


def _constrain(logits_SV: Array, allowed: Array) -> Array:
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    bits_SV = bits.reshape(len(allowed), -1)[:, : logits_SV.shape[1]]
    return jnp.where(bits_SV == 1, logits_SV, -jnp.inf)


def _top_k(logits_SV: Array, top_k: Array) -> Array:
    """Keeps the `top_k` largest, and those equal to the smallest of them."""
    return _keep_mass(logits_SV, jnp.ones_like(logits_SV), top_k.astype(jnp.float32))


def _top_p(logits_SV: Array, top_p: Array) -> Array:
    """Keeps the largest whose probabilities reach `top_p` (arXiv:1904.09751)."""
    return _keep_mass(logits_SV, jax.nn.softmax(logits_SV, axis=-1), top_p)


def _min_p(logits_SV: Array, min_p: Array) -> Array:
    """Keeps those of `min_p` times the largest probability (arXiv:2407.01082)."""
    largest = jnp.max(logits_SV, axis=-1, keepdims=True)
    return jnp.where(
        logits_SV >= largest + jnp.log(min_p)[:, None], logits_SV, -jnp.inf
    )


def _keep_mass(x_SV: Array, mass_SV: Array, least_S: Array) -> Array:
    """Keeps the largest values whose masses reach `least_S`; the others become -inf.

    The smallest kept value is found bit by bit: the largest for which the mass of all
    values from it on is enough. That is exact, and needs no sorting.
    """
    bits = jax.lax.bitcast_convert_type(x_SV, jnp.uint32)
    # Unsigned numbers in the order of the floats.
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def try_bit(index: Array, least_kept: Array) -> Array:
        tried = least_kept | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        above = jnp.sum(jnp.where(order >= tried[:, None], mass_SV, 0.0), axis=-1)
        return jnp.where(above >= least_S, tried, least_kept)

    none = jnp.zeros(len(x_SV), jnp.uint32)
    least_kept = jax.lax.fori_loop(0, 32, try_bit, none)
    # The largest value is always kept, even if a mass of zero is enough.
    least_kept = jnp.minimum(least_kept, jnp.max(order, axis=-1))
    return jnp.where(order >= least_kept[:, None], x_SV, -jnp.inf)


def _draw(seed: Array, number: Array, below_V: Array) -> Array:
    """An id by its probability, from logits whose largest is 0.

    First a block of ids is drawn and then an id of the block, by where a uniform number
    falls among the sums of probabilities. That takes two random numbers, not V.
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    first, second = jax.random.uniform(jax.random.fold_in(key, number), 2)
    rest = -len(below_V) % DRAWN_BLOCK
    mass = jnp.exp(jnp.pad(below_V, (0, rest), constant_values=-jnp.inf))
    blocks = mass.reshape(-1, DRAWN_BLOCK)
    block = _fall(jnp.sum(blocks, axis=1), first)
    return block * DRAWN_BLOCK + _fall(blocks[block], second)


def _fall(mass: Array, share: Array) -> Array:
    """The index at which the running sum exceeds a share of the whole; of mass > 0."""
    total = jnp.cumsum(mass)
    index = jnp.argmax(total > share * total[-1])
    # A share so close to 1 that the product is rounded to the whole.
    return jnp.where(share * total[-1] < total[-1], index, jnp.argmax(mass)).astype(
        jnp.int32
    )
