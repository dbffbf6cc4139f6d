"""Text from parameters: engines that are made when a model is asked, and then freed."""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from research.engine.answers.answer_progress import Answer
from research.engine.continuous_batching import Engine
from research.engine.prefix_cache import PrefixCache
from research.engine.requests import Piece, Request
from research.engine.slot_decoder import SlotDecoder
from research.formats.base_model import Base
from research.formats.load_parameters import load_base
from research.models.transformer import Model
from research.tokenize.tokenizer import Tokenizer
from research.weights.trainable import Trainable

Params = dict[str, Any]

# Numbers of slots and lengths are powers of two, so that few programs compile.
MOST_SLOTS, SHORTEST = 8, 256
# Bytes of prompts that a conversation keeps: each of its turns begins with all before.
KEPT_BYTES = 2**28


class SlotDecoders:
    """The decoders of one model, by size. Each compiles once and holds no memory.

    Attributes:
      model: the decoder; parameters come with each use.
      mesh: devices that hold the parameters.
    """

    def __init__(self, model: Model, mesh: Mesh):
        self.model, self.mesh = model, mesh
        self._decoders: dict[tuple[int, int, int | None], SlotDecoder] = {}

    @contextlib.contextmanager
    def opened(
        self, params: Params, slots: int, tokens: int, chunk: int | None = None
    ) -> Iterator[SlotDecoder]:
        """A decoder with room for `slots` answers, which is freed afterwards.

        Args:
          params: of the model, by path; they lie on `mesh`.
          slots: answers at once; there may be more.
          tokens: of the longest prompt with its answer; there may be room for more, up
            to the context of the model.
          chunk: see `SlotDecoder`.
        """
        length = min(_power_of_two(tokens, SHORTEST), self.longest)
        size = _power_of_two(slots, 1), length, chunk
        # Whoever asks for this size meanwhile gets a decoder of its own.
        decoder = self._decoders.pop(size, None)
        if decoder is None:
            decoder = SlotDecoder(
                self.model, None, *size[:2], mesh=self.mesh, chunk=chunk
            )
        decoder.open(params)
        try:
            yield decoder
        finally:
            decoder.close()
            self._decoders[size] = decoder

    @property
    def longest(self) -> int:
        """The tokens that prompt and answer may have together."""
        return self.model.architecture.max_position


class TextGenerator:
    """Answers requests with given parameters.

    Attributes:
      decoders: of the model.
      params: of the model, by path; a matrix may carry an adapter.
      tokenizer: of the model's ids.
    """

    def __init__(self, decoders: SlotDecoders, params: Params, tokenizer: Tokenizer):
        self.decoders, self.params, self.tokenizer = decoders, params, tokenizer

    @contextlib.contextmanager
    def engine(
        self, slots: int, tokens: int, prefix_bytes: int = 0
    ) -> Iterator[Engine]:
        """An engine for a while; see `SlotDecoders.opened`."""
        with self.decoders.opened(self.params, slots, tokens) as decoder:
            yield Engine(decoder, self.tokenizer, prefix_bytes=prefix_bytes)

    def stream(self, request: Request) -> Iterator[Piece]:
        """Yields the answer to one request in pieces of whole characters.

        Raises:
          UserError: the request cannot be answered, see `Engine.submit`.
        """
        with self.engine(1, _room(request)) as engine:
            yield from engine.submit(request)

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """Returns the whole answers, made side by side.

        Raises:
          UserError: a request cannot be answered, see `Engine.submit`.
        """
        return [answer.text() for answer in self.in_order(requests)]

    def in_order(
        self,
        requests: Sequence[Request],
        slots: int = MOST_SLOTS,
        prefix_bytes: int = 0,
    ) -> Iterator[Answer]:
        """Yields the answers in the order of the requests, of any number.

        Whoever takes an answer reads it before the next one. Others are made meanwhile.

        Args:
          requests: all that are answered.
          slots: answers that are made at once.
          prefix_bytes: see `Engine`.

        Raises:
          UserError: a request cannot be answered, see `Engine.submit`.
        """
        if not requests:
            return
        slots, room = min(len(requests), slots), max(map(_room, requests))
        waiting: collections.deque[Answer] = collections.deque()
        with self.engine(slots, room, prefix_bytes) as engine:
            for request in requests:
                waiting.append(engine.submit(request))
                if len(waiting) > 2 * slots:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()


class LastingGenerator(TextGenerator):
    """Keeps what it has read of prompts from one request to the next.

    The decoder is free between two requests, so models that are compared share it.
    """

    def __init__(self, decoders: SlotDecoders, params: Params, tokenizer: Tokenizer):
        super().__init__(decoders, params, tokenizer)
        self._room, self._prefixes = 0, PrefixCache(KEPT_BYTES)

    def stream(self, request: Request) -> Iterator[Piece]:
        """See `TextGenerator`; slots are as long as the longest request so far."""
        room = max(self._room, _room(request))
        with self.engine(1, room) as engine:
            self._room, engine.prefixes = room, self._prefixes
            yield from engine.submit(request)


def tuned_generator(
    decoders: SlotDecoders,
    trainable: Trainable,
    params: Params,
    frozen: Params,
    tokenizer: Tokenizer,
) -> TextGenerator:
    """Generates with the trained parameters `params` over the `frozen` ones.

    They are used as they are. A copy in the compute dtype would be faster to read, and
    might not fit beside the state of a run that is training.
    """
    return TextGenerator(decoders, trainable.forward(params, frozen, None), tokenizer)


def base_generator(
    decoders: SlotDecoders, base: Base, frozen: Params
) -> TextGenerator | None:
    """Generates with the base model: the `frozen` parameters, or the base read again.

    Returns None if training began with random parameters.
    """
    if base.tensors is None:
        return None
    model = decoders.model
    weights = frozen or load_base(
        base, model, decoders.mesh, model.options.dtype, seed=0
    )
    return TextGenerator(decoders, weights, base.tokenizer)


def _room(request: Request) -> int:
    return len(request.prompt) + request.sampling.max_new_tokens


def _power_of_two(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())
