"""The training loop. It knows no model: it counts steps and keeps one order.

The order is law: evaluate and save, then pull data, then step, then log the step
before. So a checkpoint never holds a batch that was pulled and not trained, and
writing a log never keeps the devices waiting.
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

State = Any


@dataclasses.dataclass(frozen=True)
class Action:
    """Something done between steps.

    Attributes:
      every: runs when the step is a multiple of it, and at the last step.
      run: called with (step, state).
      at_start: also runs before the first step of a fresh run.
    """

    every: int
    run: Callable[[int, State], None]
    at_start: bool = False

    def is_due(self, step: int, first: int, total: int) -> bool:
        if step == first:
            return self.at_start and step == 0
        return step % self.every == 0 or step == total


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the second SIGINT ends the process."""

    def __init__(self, *, listen: bool = True) -> None:
        self._listen = listen
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Several processes would have to agree on the step they stop at; until they
        # do, a signal ends them and the last checkpoint counts.
        if not self._listen:
            return self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def run(
    *,
    state: State,
    first: int,
    total: int,
    batches: Iterator[Any],
    step_fn: Callable[[State, Any], tuple[State, Any]],
    actions: Sequence[Action],
    log: Callable[[int, Any], None],
    resume_clock: Callable[[], None],
    stop: StopRequest,
) -> tuple[State, int]:
    """Trains from step `first` to `total`, or until `stop` is set.

    Args:
      state: after `first` updates.
      batches: device batches, positioned at step `first`.
      step_fn: dispatches one update.
      log: called with (step, metrics) once the step after has been dispatched, or
        before an action.
      resume_clock: called after actions, whose time is not the steps'.
      stop: checked before every step.

    Returns:
      The state and the number of updates it holds.
    """
    pending: tuple[int, Any] | None = None
    for step in range(first, total + 1):
        due = [action for action in actions if action.is_due(step, first, total)]
        ending = step == total or stop.signal is not None
        if pending and (due or ending):
            log(*pending)
            pending = None
        for action in due:
            action.run(step, state)
        if ending:
            break
        if due:
            resume_clock()
        state, metrics = step_fn(state, next(batches))
        if pending:
            log(*pending)
        pending = (step + 1, metrics)
    return state, step
