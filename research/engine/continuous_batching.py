"""Answers many requests at once: a queue, slots, and one round of tokens after another.

One round admits what waits into free slots, writes at most one chunk of prompts, so
that a long one cannot stop the answers of others, and takes tokens for all slots.
"""

import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from queue import Empty
from typing import TypeVar

from research.engine.adapter_names import AdapterNames, LoadedAdapter
from research.engine.answers.answer_progress import Answer, AnswerProgress, Pieces
from research.engine.answers.engine_counts import EngineCounts
from research.engine.answers.round_commands import RoundCommands
from research.engine.answers.slot_rounds import SlotRounds
from research.engine.answers.text_stream import Detokenizer, StopTexts
from research.engine.followed_decoder import LeadingDecoder
from research.engine.prefix_cache import PrefixCache
from research.engine.requests import (
    EngineFullError,
    EngineStats,
    EngineStoppedError,
    Piece,
    Request,
    Sampling,
    SlotStats,
    TokenScore,
    check_request,
)
from research.engine.slot_decoder import CacheBlock, SlotDecoder
from research.tokenize.tokenizer import Tokenizer
from research.weights.adapters.serving_bank import Row

T = TypeVar("T")
# Seconds after which an idle engine looks whether it should end.
IDLE = 0.2


class Engine:
    """Answers requests in the slots of a decoder.

    Any thread may submit, cancel, load adapters and read statistics. Rounds are taken
    by one thread in `run_forever` or, without it, by whoever reads an answer.

    Attributes:
      names: of the loaded adapters.
    """

    def __init__(
        self,
        decoder: SlotDecoder | LeadingDecoder,
        tokenizer: Tokenizer,
        *,
        most_waiting: int = 1024,
        prefix_bytes: int = 0,
        adapter_rows: int = 0,
        prompts_first: bool = False,
        when_idle: Callable[[], None] = lambda: None,
    ):
        """An engine without requests.

        Args:
          decoder: warm, if nothing may compile while requests are answered.
          tokenizer: of the model.
          most_waiting: requests that may wait beside those that free slots will take.
          prefix_bytes: the most bytes of prompt beginnings that are kept.
          adapter_rows: of the bank in the decoder's parameters; 0 without one.
          prompts_first: all prompts in slots are written before the next tokens are
            taken: more tokens per second, and answers that pause for them.
          when_idle: is called by `run_forever` now and then while nothing waits.
        """
        self._decoder, self._tokenizer = decoder, tokenizer
        self._most_waiting, self._when_idle = most_waiting, when_idle
        self.names, self.adapter_rows = AdapterNames(adapter_rows), adapter_rows
        self._waiting: collections.deque[AnswerProgress] = collections.deque()
        self._commands = RoundCommands()
        self._changed = threading.Condition()
        self._stepping = threading.RLock()
        self._driven, self._stopped = False, ""
        self._counts = EngineCounts()
        prefixes = PrefixCache(prefix_bytes)
        self._slots = SlotRounds(
            decoder, prefixes, self.names, self._counts, prompts_first
        )

    @property
    def prefixes(self) -> PrefixCache:
        """Beginnings of prompts, which engines over the same parameters may share."""
        return self._slots.prefixes

    @prefixes.setter
    def prefixes(self, shared: PrefixCache) -> None:
        self._slots.prefixes = shared

    # Called by any thread.

    def submit(
        self,
        request: Request,
        deliver: Callable[[Piece], None] | None = None,
        adapter: LoadedAdapter | None = None,
        read: CacheBlock | None = None,
    ) -> Answer:
        """Puts a request into the queue.

        Args:
          request: is answered as soon as a slot is free.
          deliver: is called with each piece by the thread that takes the rounds.
          adapter: one in use, from `names`; by default what `request` names.
          read: keys and values of all ids of the prompt but the last one, or of the
            first ones, computed by another program. The decoder is a `SlotDecoder`, and
            no id has a score.

        Raises:
          ContextOverflowError: prompt and answer are longer than a slot.
          UnknownAdapterError: no adapter has the name.
          EngineFullError: too many requests wait.
          EngineStoppedError: the engine has ended, or its decoder has failed.
          UserError: a value of the request is out of its range.
        """
        decoder = self._decoder
        check_request(request, vocabulary=decoder.vocabulary, length=decoder.length)
        answer = Answer(request, self._wait_for, deliver)
        with self._changed:
            if self._stopped:
                raise EngineStoppedError(self._stopped)
            # The first of those that wait get the free slots at the next round.
            waiting = len(self._waiting) - self._slots.tasks.count(None)
            if waiting >= self._most_waiting:
                busy = self._counts.seconds_each * waiting / decoder.slots
                raise EngineFullError(
                    f"{waiting} requests wait already; try again later",
                    retry_after=max(1.0, busy),
                )
            adapter = self.names.use(request.adapter, adapter)
            text, stop = Detokenizer(self._tokenizer), StopTexts(request.stop)
            task = AnswerProgress(answer, adapter, text, stop, read=read)
            self._waiting.append(task)
            self._changed.notify_all()
        return answer

    def score(
        self, ids: Sequence[int], adapter: str = "", top: int = 0
    ) -> tuple[TokenScore, ...]:
        """The scores of `ids[1:]`, each after all before it; raises as `submit` does.

        Args:
          ids: of a text; at least one.
          adapter: name of a loaded adapter; "" is the base model.
          top: how many of the likeliest ids are listed at each place.
        """
        nothing_new = Sampling(max_new_tokens=0)
        request = Request(
            tuple(ids), nothing_new, adapter=adapter, top_logprobs=top, echo=True
        )
        return next(iter(self.submit(request))).prompt_logprobs

    def load_adapter(self, name: str, row: Row, identity: str) -> None:
        """Gives an adapter a name, between two rounds.

        Requests that run with an older adapter of this name end with that one.

        Args:
          name: for `Request.adapter`.
          row: of `bank_row` for the decoder's parameters.
          identity: hash of its content and of its base.

        Raises:
          UserError: all rows are in use.
        """

        def load() -> None:
            loaded, is_there = self.names.place(identity)
            if not is_there:
                self._decoder.set_row(loaded.row, row, identity)
            self.names.name(name, loaded)

        self.between_rounds(load)

    def exchange_weights(self, place: Callable[[], T]) -> T:
        """The result of `place`, which gives the decoder weights of the same shapes.

        Requests that run end with the old weights first; those that wait begin with the
        new ones. Whatever was kept of prompts is dropped.
        """

        def exchange() -> T:
            self.prefixes.clear()
            with self._changed:
                for task in self._waiting:
                    task.read = None
            return place()

        return self.between_rounds(exchange, when_empty=True)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests that run with it end with it.

        Raises UnknownAdapterError: no adapter has the name.
        """
        self.names.unload(name)

    def stats(self) -> EngineStats:
        """Counts for people and monitoring."""
        waiting, length = len(self._waiting), self._decoder.length
        cached, adapters = self.prefixes.nbytes, len(self.names.identities())
        return self._counts.stats(self._slots.tasks, waiting, length, cached, adapters)

    def slot_stats(self) -> list[SlotStats | None]:
        """The answers in the slots; None for a free one."""
        return [task.stats() if task else None for task in self._slots.tasks]

    # Called by the one thread that takes the rounds.

    def run_forever(self, stop_event: threading.Event) -> None:
        """Takes rounds until the event is set, and then cancels what is left.

        Raises Exception: the decoder failed; all answers have ended with it.
        """
        self._driven = True
        try:
            while not stop_event.is_set():
                if not self.step():
                    with self._changed:
                        if not (self._waiting or self._commands):
                            self._changed.wait(IDLE)
                    self._when_idle()
        finally:
            self._stop("the engine has stopped", Piece(finish="cancelled"))
            self._driven = False

    def step(self) -> bool:
        """Takes one round; returns whether there was anything to do.

        One that has stopped has none. Raises Exception: the decoder failed, and all
        answers have ended with it.
        """
        with self._stepping:
            if self._stopped:
                return False
            try:
                worked = self._obey() + self._admit() + self._slots.write_prompts()
                return bool(worked + self._slots.take_tokens())
            except Exception as error:
                # The state of all slots may be gone, and nobody knows who is to blame.
                piece = Piece(finish="error", error=str(error))
                self._stop(f"the engine has stopped: {error!r}", piece, error)
                raise

    def _wait_for(self, pieces: Pieces) -> Piece:
        while True:
            try:
                return pieces.get(timeout=IDLE) if self._driven else pieces.get_nowait()
            except Empty:
                if not self._driven:
                    self.step()

    def between_rounds(
        self, command: Callable[[], T], *, when_empty: bool = False
    ) -> T:
        """The result of a command that the thread runs which takes the rounds.

        With `when_empty` it runs when no slot is in use; none is given away until then.

        Raises:
          EngineStoppedError: the engine has stopped before.
        """
        with self._changed:
            done = self._commands.put(command, when_empty)
            self._changed.notify_all()
        while not done.done():
            if self._driven:
                wait([done], IDLE)
            else:
                self.step()
        return done.result()

    def _obey(self) -> int:
        """Runs the commands whose time has come, and ends what was cancelled."""
        tasks = self._slots.tasks
        count = self._commands.run(are_empty=not any(tasks))
        with self._changed:
            gone = [task for task in self._waiting if task.answer.cancelled]
            for task in gone:
                self._waiting.remove(task)
        gone += [task for task in tasks if task and task.answer.cancelled]
        for task in gone:
            self._slots.end(task, Piece(finish="cancelled"))
        return count + len(gone)

    def _admit(self) -> int:
        """Gives free slots to those that have waited longest."""
        admitted = 0
        if self._commands.need_empty_slots:
            return admitted
        for slot in [i for i, task in enumerate(self._slots.tasks) if not task]:
            with self._changed:
                if not self._waiting:
                    break
                task = self._waiting.popleft()
            self._slots.admit(slot, task)
            admitted += 1
        return admitted

    def _stop(self, why: str, piece: Piece, error: Exception | None = None) -> None:
        """Ends all that runs or waits; the engine takes nothing any longer."""
        with self._changed:
            self._stopped = self._stopped or why
            self._commands.refuse(self._stopped)
            tasks = [task for task in (*self._slots.tasks, *self._waiting) if task]
            self._waiting.clear()
        for task in tasks:
            self._slots.end(task, piece, error, is_lost=error is not None)
