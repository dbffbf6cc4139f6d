"""The device side of the engine: S slots that decode together, one answer in each.

A request is admitted to a slot; its prompt, but for the last token, is written in
chunks; from then on each round takes one token of every slot. Few programs do all
this, whoever is in the slots, so nothing compiles while requests are answered, and an
answer does not depend on the other slots.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config.knob_groups import MeshConfig
from research.core.errors import UserError
from research.engine import slot_programs as programs
from research.engine.requests import Sampling
from research.engine.slot_programs import (
    CacheBlock,
    Round,
    Scores,
    SlotRows,
    Slots,
)
from research.engine.token_choice import ChoiceState, choice_row
from research.models.cached_attention import (
    cache_partition,
    constrain_cached,
    make_attend_cached,
)
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.parallel.logit_rows import (
    make_gather_head,
    make_place,
    rows_partition,
    top_k_of_placed,
    top_k_of_whole,
)
from research.weights.adapters.serving_bank import Row, set_row

Array = jax.Array
Params = dict[str, Any]

# Prompt tokens written at a time, and rounds of one call: on a CPU, where latency
# counts and a call costs little, and on accelerators.
CPU_CHUNK, CPU_ROUNDS = 64, 1
ACCELERATOR_CHUNK, ACCELERATOR_ROUNDS = 256, 8
# The end of a prompt is written by the smallest program that holds it, of a whole chunk
# or of these shares of one.
SHARES = (4, 2, 1)
# On a CPU, XLA takes ten times as long for a product of one row as for one of two.
FEWEST_CPU_SLOTS = 2
# Arrays of `ChoiceState` that grow with the vocabulary.
WIDE = ("in_prompt", "counts", "allowed")


@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """How one request is answered.

    Attributes:
      sampling: how its tokens are chosen, and how many at most.
      stop_ids: ids that end it.
      adapter_row: of the bank in the parameters; 0 is the base.
      top: gives log-probabilities and, if above 0, those of the likeliest ids.
      prompt_ids: of the prompt; read with a repetition penalty.
    """

    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    adapter_row: int = 0
    top: int | None = None
    prompt_ids: Sequence[int] = ()


class SlotDecoder:
    """Decodes up to S answers together.

    Attributes:
      params: of the model, by path; may be replaced between calls by others of the
        same shapes and shardings.
      slots: S, which on a CPU is at least 2.
      length: the most tokens of prompt and answer together.
      chunk: the most tokens of one `extend`.
      sizes: the tokens that one `extend` computes, in ascending order up to `chunk`.
      rounds: R, the most tokens a slot gets from one `decode`.
      vocabulary: V, the number of ids.
      traces: how often a program was traced. Constant after `warm_up`.
    """

    def __init__(
        self,
        model: Model,
        params: Params | None,
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
          params: lie on `mesh`; None leaves the decoder closed.
          slots: S; a CPU makes 2 of 1.
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
        cpu = self._mesh.devices.flat[0].platform == "cpu"
        slots = max(slots, FEWEST_CPU_SLOTS) if cpu else slots
        self.slots, self.length, self.vocabulary = slots, length, a.vocab
        self.chunk = chunk or (CPU_CHUNK if cpu else ACCELERATOR_CHUNK)
        self.sizes = sorted({-(-self.chunk // share) for share in SHARES})
        self.rounds = rounds or (CPU_ROUNDS if cpu else ACCELERATOR_ROUNDS)
        self.traces = 0
        self._model = model.with_options(
            attend_cached=make_attend_cached(self._mesh, slots, a.kv_heads),
            constrain_cached=constrain_cached(self._mesh, slots),
        )
        self._compile()
        self.open(params)

    def _compile(self) -> None:
        """Makes the programs; each compiles at its first call."""
        mesh, slots = self._mesh, self.slots
        whole = meshes.replicated(mesh)
        state = slot_shardings(mesh, slots, self._model.architecture.kv_heads)
        self._block = NamedSharding(mesh, PartitionSpec(None, None, state.k.spec[2]))

        # One token more than is used: a slot that waits writes there in each round.
        room = max(self.length + 1, -(-self.length // self.chunk) * self.chunk)

        def program(
            result: Any, function: Callable[..., Any], *fixed: Any, donate: bool = True
        ) -> Any:
            def traced(*arguments: Any) -> Any:
                self.traces += 1
                return function(*fixed, *arguments)

            # Named for profiles, and for the place of the state to be donated.
            names = [*inspect.signature(function).parameters][len(fixed) :]
            donated = [i for i, name in enumerate(names) if donate and name == "slots"]
            traced.__name__ = function.__name__
            return jax.jit(traced, out_shardings=result, donate_argnums=donated)

        model = self._model
        self._empty = program(state, lambda: programs.empty(model, self.slots, room))
        self._admit = program(state, programs.admit)
        self._start = program(state, programs.start)
        self._constrain = program(state, programs.constrain)
        self._write = program(state, programs.write_block, self.chunk)
        self._read = program(self._block, programs.read_block, self.chunk, donate=False)
        self._extend = program(
            (state, whole), programs.extend, model, top_k_of_whole(mesh)
        )
        self._decode = program(
            (state, whole),
            programs.decode,
            model,
            self.rounds,
            make_gather_head(mesh, model.specs),
            make_place(mesh),
            top_k_of_placed(mesh),
        )

    def open(self, params: Params | None) -> None:
        """Takes parameters and empties all slots; the programs stay compiled."""
        self.params = params
        self._filled = [0] * self.slots
        self._state = None if params is None else self._empty()

    def close(self) -> None:
        """Frees the slots' memory and lets go of the parameters, until `open`."""
        self.open(None)

    def warm_up(self) -> None:
        """Compiles every program. Call it before any request is admitted."""
        self.admit(0, SlotSettings(Sampling()))
        for size in self.sizes:
            self.score(0, [0] * size, [0] * size)
            self.free(0)
        self.write_block(0, 0, self.read_block(0, 0))
        self.constrain(0, np.full(-(-self.vocabulary // 32), -1, np.int32))
        self.start(0, 0)
        self.decode()
        self.free(0)

    def admit(self, slot: int, settings: SlotSettings) -> None:
        """Gives an empty slot to a request.

        Raises:
          UserError: the settings do not fit the model or the program.
        """
        sampling = settings.sampling
        choice = choice_row(
            sampling, settings.stop_ids, settings.prompt_ids, self.vocabulary
        )
        row = programs.free_row(
            choice,
            limit=np.int32(sampling.max_new_tokens),
            scored=np.bool(settings.top is not None),
            listed=np.bool(settings.top),
            adapter=np.int32(settings.adapter_row),
        )
        self._state = self._admit(self._state, np.int32(slot), row)
        self._filled[slot] = 0

    def free(self, slot: int) -> None:
        """Ends the answer of a slot."""
        self.admit(slot, SlotSettings(Sampling()))

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """Writes the next ids of a prompt, at most `chunk`.

        Raises:
          ValueError: there is no room, or the chunk before was not a whole one.
        """
        self._extended(slot, ids, ids, scored=False, listed=False)

    def size(self, count: int) -> int:
        """The tokens that `extend` computes to write `count`, or a whole chunk."""
        return next((size for size in self.sizes if size >= count), self.chunk)

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
        words = -(-self.vocabulary // 32)
        bits = np.zeros(words, np.uint32) if allowed is None else allowed
        self._state = self._constrain(
            self._state,
            np.int32(slot),
            np.bool(allowed is not None),
            np.ascontiguousarray(bits).view(np.uint32),
        )

    def decode(self) -> Round:
        """Takes up to R tokens for each slot that is answering."""
        return self.read(self.launch())

    def launch(self) -> Round:
        """Starts a `decode`; `read` waits for its result. Any call may be between."""
        self._state, result = self._decode(self.params, self._state)
        return result

    def read(self, launched: Round) -> Round:
        """The result of a `decode` that `launch` has started."""
        return jax.device_get(launched)

    def set_row(self, index: int, row: Row, identity: str) -> None:
        """Writes an adapter into row `index` of the bank that `params` hold.

        Args:
          index: of the row, at least 1.
          row: the factors.
          identity: of its content; other decoders use it.
        """
        self.params = set_row(self.params, index, row)

    def read_block(self, slot: int, index: int) -> CacheBlock:
        """A copy of what chunk `index` of a prompt wrote into its slot."""
        return self._read(self._state, np.int32(slot), np.int32(index))

    def write_block(self, slot: int, index: int, block: CacheBlock) -> None:
        """Writes chunk `index` of a prompt as `read_block` read it, after those before.

        Raises:
          ValueError: the chunks before are not there.
        """
        self._write_part(slot, index, self.chunk, block)

    def write_prompt(self, slot: int, block: CacheBlock) -> None:
        """Writes into an empty slot what another program computed of a prompt.

        Args:
          slot: its number.
          block: of all ids of the prompt but the last one, or of the first ones; they
            fill whole chunks then, as `extend` continues behind such. On the host.

        Raises:
          ValueError: the slot is not empty.
        """
        tokens = block.k.shape[3]
        for index, start in enumerate(range(0, tokens, self.chunk)):
            count = min(self.chunk, tokens - start)
            rest = [(0, 0)] * 3 + [(0, self.chunk - count), (0, 0)]
            part = jax.tree.map(
                lambda x, start=start, count=count, rest=rest: np.pad(
                    x[:, :, :, start : start + count], rest
                ),
                block,
            )
            # As `read_block` gives it, so that nothing is traced again.
            part = jax.device_put(part, self._block)
            self._write_part(slot, index, count, part)

    def _write_part(self, slot: int, index: int, count: int, block: CacheBlock) -> None:
        if self._filled[slot] != index * self.chunk:
            raise ValueError(f"slot {slot} has {self._filled[slot]} tokens")
        at = np.int32(slot), np.int32(index), np.int32(count)
        self._state = self._write(self._state, *at, block)
        self._filled[slot] += count

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
        given = np.zeros((2, self.size(count)), np.int32)
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


def slot_shardings(mesh: Mesh, slots: int, kv_heads: int) -> Slots:
    """The shardings of the state, in the place of its arrays.

    An array as wide as the vocabulary lies by rows, where the tokens of its slots are
    chosen: for 64 slots a chip, 256 chips and 128,256 ids the whole would take 8 GB.
    """
    keys = NamedSharding(mesh, cache_partition(mesh, slots, kv_heads))
    whole, own = (
        meshes.replicated(mesh),
        NamedSharding(mesh, rows_partition(mesh, slots)),
    )
    choice = {field.name: whole for field in dataclasses.fields(ChoiceState)}
    choice |= dict.fromkeys(WIDE, own)
    rows = {field.name: whole for field in dataclasses.fields(SlotRows)}
    return Slots(keys, keys, SlotRows(**rows | {"choice": ChoiceState(**choice)}))
