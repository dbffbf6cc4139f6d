"""The device side of the engine: S slots that decode together, one answer in each.

A request is admitted to a slot; its prompt, but for the last token, is written in
chunks; from then on each round takes one token of every slot. Few programs do all
this, whoever is in the slots, so nothing compiles while requests are answered, and an
answer does not depend on the other slots.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config.knob_groups import MeshConfig
from research.core.errors import UserError
from research.engine.requests import Sampling
from research.engine.token_choice import (
    ChoiceState,
    choice_row,
    choose,
    log_probabilities,
)
from research.models.cached_attention import cache_partition, make_attend_cached
from research.models.transformer import Cache, Model
from research.parallel import mesh as meshes

Array = jax.Array
Params = dict[str, Any]

# Prompt tokens written at a time, and rounds of one call: on a CPU, where latency
# counts and a call costs little, and on accelerators.
CHUNK, ROUNDS = {"cpu": 64}, {"cpu": 1}
ACCELERATOR_CHUNK, ACCELERATOR_ROUNDS = 256, 8


@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """What one request is answered with.

    Attributes:
      sampling: how its tokens are chosen, and how many at most.
      stop_ids: ids that end it.
      adapter_row: of the bank in the parameters; 0 is the base.
      top: gives log-probabilities and, if above 0, those of the likeliest ids.
      prompt_ids: of the prompt; read with a repetition penalty.
    """

    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    adapter_row: int = 0
    top: int | None = None
    prompt_ids: Sequence[int] = ()


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
class Block:
    """Keys and values of one chunk of a prompt, `[L, 1, K, CHUNK, H]` each."""

    k: Array
    v: Array

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class SlotDecoder:
    """Decodes up to S answers together.

    Attributes:
      params: of the model, by path; may be replaced between calls by others of the
        same shapes and shardings.
      slots: S.
      length: the most tokens of prompt and answer together.
      chunk: the most tokens of one `extend`.
      rounds: R, the most tokens a slot gets from one `decode`.
      traces: how often a program was traced. Constant after `warm_up`.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        slots: int,
        length: int,
        *,
        mesh: Mesh | None = None,
        chunk: int | None = None,
        rounds: int | None = None,
    ):
        """Reserves the slots.

        Args:
          model: the decoder; `options.dtype` is that of keys and values.
          params: lie on `mesh`.
          slots: S.
          length: the most tokens of prompt and answer together.
          mesh: by default the first device alone.
          chunk: by default 64 on a CPU and 256 elsewhere.
          rounds: by default 1 on a CPU and 8 elsewhere.

        Raises:
          UserError: `length` exceeds the model's context.
        """
        a = model.architecture
        if not 1 <= length <= a.max_position:
            raise UserError(
                f"slots for {length} tokens: the model's context is {a.max_position}"
            )
        self._mesh = mesh or meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        platform = self._mesh.devices.flat[0].platform
        self.params, self.slots, self.length = params, slots, length
        self.chunk = chunk or CHUNK.get(platform, ACCELERATOR_CHUNK)
        self.rounds = rounds or ROUNDS.get(platform, ACCELERATOR_ROUNDS)
        self.traces = 0
        attend = make_attend_cached(self._mesh, slots, a.kv_heads)
        self._model = model.with_options(attend_cached=attend)
        where = cache_partition(self._mesh, slots, a.kv_heads)
        self._rows_split = PartitionSpec(where[1])
        self._filled = [0] * slots
        self._compile(NamedSharding(self._mesh, where))

    def _compile(self, keys: NamedSharding) -> None:
        whole = meshes.replicated(self._mesh)
        state = Slots(keys, keys, whole)

        def program(function: Callable[..., Any], result: Any, donated: int = 1):
            @functools.wraps(function)
            def traced(*arguments: Any) -> Any:
                self.traces += 1
                return function(*arguments)

            return jax.jit(traced, out_shardings=result, donate_argnums=donated)

        self._admit = program(_admit, state, 0)
        self._start = program(_start, state, 0)
        self._constrain = program(_constrain, state, 0)
        self._extend = program(self._extend_program, (state, whole))
        self._decode = program(self._decode_program, (state, whole))
        self._read = program(
            functools.partial(_read, self.chunk), None, donated=()
        )
        self._write = program(functools.partial(_write, self.chunk), state, 0)
        self._state = program(self._empty, state, donated=())()

    def warm_up(self) -> None:
        """Compiles every program. Call it before any request is admitted."""
        vocab = self._model.architecture.vocab
        self.admit(0, SlotSettings())
        self.score(0, [0], [0])
        self.write_block(0, 0, self.read_block(0, 0))
        self.constrain(0, np.full(-(-vocab // 32), -1, np.int32))
        self.start(0, 0)
        self.decode()
        self.free(0)

    def admit(self, slot: int, settings: SlotSettings) -> None:
        """Gives an empty slot to a request.

        Raises:
          UserError: the settings do not fit the model or the program.
        """
        sampling, vocab = settings.sampling, self._model.architecture.vocab
        choice = choice_row(sampling, settings.stop_ids, settings.prompt_ids, vocab)
        zero, no = np.int32(0), np.bool(False)
        row = SlotRows(
            length=zero,
            token=zero,
            active=no,
            number=zero,
            limit=np.int32(sampling.max_new_tokens),
            scored=np.bool(settings.top is not None),
            listed=np.bool(settings.top),
            adapter=np.int32(settings.adapter_row),
            choice=choice,
        )
        self._state = self._admit(self._state, np.int32(slot), row)
        self._filled[slot] = 0

    def free(self, slot: int) -> None:
        """Ends the answer of a slot."""
        self.admit(slot, SlotSettings())

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """Writes the next ids of a prompt, at most `chunk`.

        Raises:
          ValueError: there is no room, or the chunk before was not a whole one.
        """
        self._extended(slot, ids, ids, scored=False, listed=False)

    def score(
        self, slot: int, ids: Sequence[int], next_ids: Sequence[int], top: int = 0
    ) -> Scores:
        """`extend`, and the log-probability of `next_ids[i]` after `ids[i]`."""
        scores = self._extended(slot, ids, next_ids, scored=True, listed=top > 0)
        return jax.tree.map(lambda x: np.asarray(x)[: len(ids)], scores)

    def start(self, slot: int, token: int) -> None:
        """Begins the answer; `token` is the last one of the prompt."""
        self._state = self._start(self._state, np.int32(slot), np.int32(token))

    def constrain(self, slot: int, allowed: np.ndarray | None) -> None:
        """Allows the next token of a slot only these ids, or all ids again.

        A constrained slot takes one token for each call of `decode`.

        Args:
          slot: its number.
          allowed: bits of 32-bit words `[ceil(V / 32)]`, that of id 0 lowest.
        """
        words = -(-self._model.architecture.vocab // 32)
        bits = np.zeros(words, np.uint32) if allowed is None else allowed
        self._state = self._constrain(
            self._state,
            np.int32(slot),
            np.bool(allowed is not None),
            np.ascontiguousarray(bits).view(np.uint32),
        )

    def decode(self) -> Round:
        """Takes up to R tokens for each slot that is answering."""
        self._state, result = self._decode(self.params, self._state)
        return jax.device_get(result)

    def read_block(self, slot: int, index: int) -> Block:
        """A copy of what chunk `index` of a prompt wrote into its slot."""
        return self._read(self._state, np.int32(slot), np.int32(index))

    def write_block(self, slot: int, index: int, block: Block) -> None:
        """Writes chunk `index` of a prompt as `read_block` read it, after those before.

        Raises:
          ValueError: the chunks before are not there.
        """
        if self._filled[slot] != index * self.chunk:
            raise ValueError(f"slot {slot} has {self._filled[slot]} tokens")
        self._state = self._write(self._state, np.int32(slot), np.int32(index), block)
        self._filled[slot] += self.chunk

    def _extended(
        self,
        slot: int,
        ids: Sequence[int],
        next_ids: Sequence[int],
        *,
        scored: bool,
        listed: bool,
    ) -> Scores:
        filled, count = self._filled[slot], len(ids)
        if filled % self.chunk or not 1 <= count <= self.chunk:
            raise ValueError(f"{count} ids after {filled}, chunks of {self.chunk}")
        if filled + count > self.length:
            raise ValueError(f"{filled + count} tokens in a slot for {self.length}")
        given = np.zeros((2, self.chunk), np.int32)
        given[:, :count] = ids, next_ids
        self._state, scores = self._extend(
            self.params,
            self._state,
            np.int32(slot),
            given,
            np.int32(count),
            np.bool(scored),
            np.bool(listed),
        )
        self._filled[slot] += count
        return scores

    # The programs.

    def _empty(self) -> Slots:
        # One token more than is used: a slot that waits writes there in each round.
        room = max(self.length + 1, -(-self.length // self.chunk) * self.chunk)
        cache = self._model.init_cache(self.slots, room)
        vocab = self._model.architecture.vocab
        row = SlotRows(*[np.int32(0)] * 8, choice_row(Sampling(), (), (), vocab))
        kinds = dict.fromkeys(("active", "scored", "listed"), np.bool(False))
        row = dataclasses.replace(row, **kinds)
        rows = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (self.slots, *x.shape)), row
        )
        return Slots(cache.k, cache.v, rows)

    def _extend_program(
        self, params, slots: Slots, slot, given_2T, count, scored, listed
    ):
        rows, start = slots.rows, slots.rows.length
        hidden, cache = self._model.decode(
            params, given_2T[:1], Cache(slots.k, slots.v, start), slot
        )

        def score(hidden_TD):
            logits = self._model.logits(params, hidden_TD)
            return Scores(*log_probabilities(logits, given_2T[1], listed))

        scores = _if(scored, score, hidden[0])
        rows = dataclasses.replace(rows, length=start.at[slot].add(count))
        return Slots(cache.k, cache.v, rows), scores

    def _decode_program(self, params, slots: Slots):
        result = jax.eval_shape(functools.partial(self._advance, params), 0, slots)[1]
        result = jax.tree.map(
            lambda x: jnp.zeros((self.rounds, *x.shape), x.dtype), result
        )
        ids, scores = result
        carry = 0, slots, (ids - 1, scores)

        def going(carry):
            index, slots, _ = carry
            return (index < self.rounds) & jnp.any(_turns(slots.rows, index))

        def advance(carry):
            index, slots, results = carry
            slots, found = self._advance(params, index, slots)
            results = jax.tree.map(lambda x, y: x.at[index].set(y), results, found)
            return index + 1, slots, results

        _, slots, (ids, scores) = jax.lax.while_loop(going, advance, carry)
        # A copy: the state that holds it will be donated.
        return slots, Round(ids, scores, jnp.copy(slots.rows.active))

    def _advance(self, params, index, slots: Slots):
        """One round: the next token of each slot whose turn it is."""
        rows, turn_S = slots.rows, _turns(slots.rows, index)
        hidden, cache = self._model.decode(
            params, rows.token[:, None], Cache(slots.k, slots.v, rows.length)
        )
        logits_SV = jax.lax.with_sharding_constraint(
            self._model.logits(params, hidden[:, 0]),
            NamedSharding(self._mesh, self._rows_split),
        )
        ids_S = choose(rows.choice, logits_SV, rows.number, turn_S)
        listed = jnp.any(turn_S & rows.listed)
        scores = _if(
            jnp.any(turn_S & rows.scored),
            lambda x: Scores(*log_probabilities(x, ids_S, listed)),
            logits_SV,
        )
        number_S = rows.number + turn_S
        ended_S = jnp.any(rows.choice.stop_ids == ids_S[:, None], axis=1)
        ended_S |= number_S >= rows.limit
        counts = rows.choice.counts.at[jnp.arange(self.slots), ids_S].add(
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
        said = jnp.where(turn_S, ids_S, -1), scores
        return Slots(cache.k, cache.v, rows), said


def _turns(rows: SlotRows, index: Array) -> Array:
    """Slots that take a token in round `index`: a constraint allows only the next."""
    return rows.active & ((index == 0) | ~rows.choice.constrained)


def _if(wanted: Array, function: Callable[[Array], Any], x: Array) -> Any:
    """`function(x)`, or zeros of its shapes."""
    none = jax.eval_shape(function, x)
    zeros = functools.partial(
        jax.tree.map, lambda y: jnp.zeros(y.shape, y.dtype), none
    )
    return jax.lax.cond(wanted, function, lambda x: zeros(), x)


def _admit(slots: Slots, slot: Array, row: SlotRows) -> Slots:
    rows = jax.tree.map(lambda x, y: x.at[slot].set(y), slots.rows, row)
    return dataclasses.replace(slots, rows=rows)


def _start(slots: Slots, slot: Array, token: Array) -> Slots:
    rows = dataclasses.replace(
        slots.rows,
        token=slots.rows.token.at[slot].set(token),
        active=slots.rows.active.at[slot].set(True),
    )
    return dataclasses.replace(slots, rows=rows)


def _constrain(slots: Slots, slot: Array, constrained: Array, allowed: Array) -> Slots:
    choice = slots.rows.choice
    choice = dataclasses.replace(
        choice,
        constrained=choice.constrained.at[slot].set(constrained),
        allowed=choice.allowed.at[slot].set(allowed),
    )
    return dataclasses.replace(
        slots, rows=dataclasses.replace(slots.rows, choice=choice)
    )


def _read(chunk: int, slots: Slots, slot: Array, index: Array) -> Block:
    layers, _, kv_heads, _, width = slots.k.shape
    at, size = (0, slot, 0, index * chunk, 0), (layers, 1, kv_heads, chunk, width)
    k, v = (jax.lax.dynamic_slice(x, at, size) for x in (slots.k, slots.v))
    return Block(k, v)


def _write(chunk: int, slots: Slots, slot: Array, index: Array, block: Block) -> Slots:
    at = (0, slot, 0, index * chunk, 0)
    put = jax.lax.dynamic_update_slice
    length = slots.rows.length.at[slot].set((index + 1) * chunk)
    return Slots(
        put(slots.k, block.k, at),
        put(slots.v, block.v, at),
        dataclasses.replace(slots.rows, length=length),
    )
