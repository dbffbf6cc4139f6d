"""Counts of an engine since it began."""

import collections
import time
from collections.abc import Sequence

from research.engine.answers.answer_progress import AnswerProgress
from research.engine.requests import EngineStats


class EngineCounts:
    """Counts requests and tokens.

    Attributes:
      seconds_each: a running mean of how long an answer has its slot.
    """

    def __init__(self) -> None:
        self.seconds_each = 1.0
        self._hits = self._prompt_tokens = self._new_tokens = 0
        self._finished: collections.Counter[str] = collections.Counter()

    def prepared(self, task: AnswerProgress) -> None:
        """A request has its slot, with what was known of its prompt."""
        self._hits += task.cached
        self._prompt_tokens += len(task.request.prompt)

    def delivered(self, tokens: int) -> None:
        """Answers have got this many new tokens."""
        self._new_tokens += tokens

    def ended(self, task: AnswerProgress, finish: str) -> None:
        """An answer has ended."""
        self._finished[finish] += 1
        if task.slot >= 0:
            busy = time.monotonic() - task.answer.admitted_at
            self.seconds_each += 0.1 * (busy - self.seconds_each)

    def stats(
        self,
        slots: Sequence[AnswerProgress | None],
        waiting: int,
        length: int,
        prefix_bytes: int,
        adapter_rows: int,
    ) -> EngineStats:
        """All counts; `slots` have `length` tokens each."""
        running = [task for task in slots if task]
        return EngineStats(
            slots=len(slots),
            running=len(running),
            waiting=waiting,
            cache_tokens=sum(task.written + task.new for task in running),
            cache_capacity=len(slots) * length,
            prefix_bytes=prefix_bytes,
            prefix_hits=self._hits,
            adapter_rows=adapter_rows,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            finished=dict(self._finished),
        )
