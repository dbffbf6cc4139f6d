"""The answer to one request: what readers see of it, and how far it is."""

import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from research.engine.adapter_names import LoadedAdapter
from research.engine.answers.text_stream import Detokenizer, StopTexts
from research.engine.requests import Finish, Piece, Request, SlotStats, TokenScore
from research.engine.slot_decoder import CacheBlock, Round, Scores, SlotSettings

Pieces = queue.SimpleQueue[Piece]


class Answer:
    """The answer to one request, piece by piece; any thread may read or cancel it.

    Attributes:
      request: the request.
      cancelled: whether somebody cancelled it.
      admitted_at, first_token_at: `time.monotonic()` of the events; 0 until then.
      failure: what it failed with.
    """

    def __init__(
        self,
        request: Request,
        wait: Callable[[Pieces], Piece],
        deliver: Callable[[Piece], None] | None = None,
    ):
        """Made by `Engine.submit`.

        Args:
          request: the request.
          wait: takes the next piece from a queue, and rounds until there is one.
          deliver: receives the pieces; by default they wait to be read here.
        """
        self.request, self.cancelled = request, False
        self.admitted_at = self.first_token_at = 0.0
        self.failure: Exception | None = None
        self._wait, self._pieces = wait, Pieces()
        self._deliver = deliver or self._pieces.put

    def cancel(self) -> None:
        """Ends the answer before the next round, unless it has ended."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces as they come. Who stops reading cancels the answer.

        Raises:
          Exception: what the answer failed with.
        """
        try:
            while True:
                piece = self._wait(self._pieces)
                if self.failure:
                    raise self.failure
                yield piece
                if piece.finish:
                    return
        finally:
            self.cancel()

    def text(self) -> str:
        """The whole answer.

        Raises:
          Exception: what the answer failed with.
        """
        return "".join(piece.text for piece in self)

    def deliver(self, piece: Piece) -> None:
        """Gives a piece to the reader."""
        try:
            self._deliver(piece)
        except Exception:  # A reader's fault must not reach the other answers.
            logging.exception("a reader failed; its answer is cancelled")
            self.cancel()


@dataclasses.dataclass(eq=False)
class AnswerProgress:
    """A request that waits or has a slot, and what its answer has so far.

    Attributes:
      answer: receives the pieces.
      adapter: answers the request.
      detokenizer: of the answer.
      stop: the texts that end it.
      slot: its number; -1 while the request waits.
      due: the round in which its prompt would be written if no other was.
      keys: of the whole chunks of its prompt.
      written: tokens of the prompt in the slot.
      cached: those of them that came from the prefix cache.
      decodes: whether the prompt is written and the answer has begun.
      new: tokens of the answer.
      scores: of the prompt, as far as it is written.
      ended: whether the last piece is delivered.
      read: keys and values of the prompt, or of its beginning, that another program
        has computed; None once they are in the slot, or if there are none.
    """

    answer: Answer
    adapter: LoadedAdapter
    detokenizer: Detokenizer
    stop: StopTexts
    slot: int = -1
    due: int = 0
    keys: Sequence[bytes] = ()
    written: int = 0
    cached: int = 0
    decodes: bool = False
    new: int = 0
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    ended: bool = False
    read: CacheBlock | None = None

    @property
    def request(self) -> Request:
        return self.answer.request

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end this answer."""
        request = self.request
        return frozenset() if request.ignore_eos else request.stop_ids

    @property
    def unwritten(self) -> int:
        """Tokens of the prompt that are to be written: all but the last one."""
        return len(self.request.prompt) - 1 - self.written

    @property
    def unscored(self) -> int:
        """Ids at the beginning of the prompt whose next ones need no score."""
        request = self.request
        return request.echo_from - 1 if request.echo else len(request.prompt)

    def stats(self) -> SlotStats:
        """How far it is, for people and monitoring."""
        request = self.request
        return SlotStats(
            request.adapter,
            len(request.prompt),
            # The last token of a prompt is the first that is decoded.
            self.written + self.decodes,
            self.cached,
            self.new,
            request.sampling.max_new_tokens,
        )

    def settings(self) -> SlotSettings:
        """The settings of its slot."""
        request = self.request
        return SlotSettings(
            sampling=request.sampling,
            stop_ids=self.stop_ids,
            adapter_row=self.adapter.row,
            top=request.top_logprobs,
            prompt_ids=request.prompt,
        )

    def next_part(self, chunk: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The next ids of the prompt to write, and the id after each of them."""
        start = self.written
        end = start + min(chunk, self.unwritten)
        prompt = self.request.prompt
        return prompt[start:end], prompt[start + 1 : end + 1]

    def add_scores(self, scores: Scores, following: Sequence[int]) -> None:
        """Takes the scores of the next ids of the prompt, those that are wanted."""
        top = self.request.top_logprobs or 0
        first = max(self.unscored - self.written, 0)
        self.scores += [
            _score(scores, i, following[i], top) for i in range(first, len(following))
        ]

    def take(self, found: Round) -> Piece:
        """The piece that the tokens of a round make.

        Raises:
          UserError: a token has no place in the form that the answer must have.
        """
        request = self.request
        ids, text, finish = [], "", ""
        for token in found.ids[:, self.slot].tolist():
            if token < 0 or finish:
                break
            ids.append(token)
            fresh, finish = self._read(token, self.new + len(ids))
            text += fresh
        scores = ()
        if request.top_logprobs is not None:
            scores = tuple(
                _score(found.scores, (i, self.slot), token, request.top_logprobs)
                for i, token in enumerate(ids)
            )
        piece = self.piece(text=text, ids=tuple(ids), logprobs=scores, finish=finish)
        if not self.new:
            self.answer.first_token_at = time.monotonic()
        self.new += len(ids)
        return piece

    def _read(self, token: int, number: int) -> tuple[str, Finish]:
        """The text of token `number`, counted from 1, and whether the answer ends."""
        request = self.request
        finish: Finish = "length" if number == request.sampling.max_new_tokens else ""
        text = ""
        if token in self.stop_ids:
            finish = "stop"
        else:
            text, stopped = self.stop.push(self.detokenizer.push(token))
            if stopped:
                return text, "stop"
            if request.constraint and request.constraint.advance(token):
                finish = "stop"
        if finish:
            rest, stopped = self.stop.push(self.detokenizer.close())
            text += rest
            if stopped:
                return text, "stop"
            text += self.stop.close()
        return text, finish

    def piece(self, **values: Any) -> Piece:
        """A piece; the first one has what is known of the prompt."""
        if not self.new:
            values["cached_tokens"] = self.cached
            values["prompt_logprobs"] = tuple(self.scores)
        return Piece(**values)


def _score(scores: Scores, at: Any, token: int, top: int) -> TokenScore:
    ids, logprobs = scores.top_ids[at][:top], scores.top_logprobs[at][:top]
    best = zip(np.asarray(ids).tolist(), np.asarray(logprobs).tolist(), strict=True)
    return TokenScore(token, float(scores.logprobs[at]), tuple(best))
