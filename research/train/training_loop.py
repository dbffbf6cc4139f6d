"""The training loop. It knows no model: it counts steps and keeps one order.

The order is fixed: evaluate and save, then pull data, then dispatch the step, then log
the step before it. So the data position in a checkpoint never counts a batch that was
pulled but not trained, and the devices never wait for a log to be written. Where the
dispatch of a step is all of it, the step is logged at once: else the time of the next
one would count as its own.

There is one exception: an action at the start may keep a copy of the state that it
needs, and then the first step is dispatched before it. So a first step that fails does
so at once, and not after a long evaluation. Actions that keep no copy still go first,
and so do all where a request must be answered with what they measure.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from research.runs.control.os_signals import Preempted, StopRequest
from research.runs.control.request_files import STOP
from research.runs.control.request_listener import RequestListener
from research.runs.phase_timer import PhaseTimer

State = Any
Beside = Callable[[Any], contextlib.AbstractContextManager[Any]]


class NumberedBatches(Protocol):
    """Device batches; `number` is that of the last one, counted from 0 over the run."""

    number: int

    def __next__(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Action:
    """Something done between steps.

    Attributes:
      phase: the phase that its time counts for.
      every: runs when the step is a multiple of it, and at the last step.
      run: called with (step, state).
      request: the kind of request that makes it run at once, or "".
      settle: waits until the work that `run` began is done; called before a request
        is answered.
      at_start: also runs before the first step of this start.
      wanted: called with the step; whether it runs there, too. Its answer may not
        depend on what is done at that step.
      keep: copies what `run` needs of a state. Where it is given, the action at the
        start runs on the copy, after the first step is dispatched. Its result must not
        decide whether that step is taken.
    """

    phase: str
    every: int
    run: Callable[[int, State], None]
    at_start: bool = False
    request: str = ""
    settle: Callable[[], None] = lambda: None
    wanted: Callable[[int], bool] = lambda step: False
    keep: Callable[[State], State] | None = None

    def is_due(
        self, step: int, first: int, is_last: bool, requested: Collection[str] = ()
    ) -> bool:
        """Whether to run at `step` of a start that trains from `first` on."""
        if self.request in requested:
            return True
        if step == first:
            return self.at_start
        return step % self.every == 0 or is_last or self.wanted(step)


def run(
    *,
    state: State,
    first: int,
    total: int,
    batches: NumberedBatches,
    step_fn: Callable[[State, Any], tuple[State, Any]],
    actions: Sequence[Action],
    log: Callable[[int, int, Any], None],
    resume_clock: Callable[[], None],
    stop: StopRequest,
    requests: RequestListener,
    phases: PhaseTimer,
    ends: Callable[[int], bool] = lambda step: False,
    beside: Beside = contextlib.nullcontext,
    at_once: bool = False,
) -> tuple[State, int]:
    """Trains from step `first` to `total`, or until `stop` is due.

    Args:
      state, batches: after `first` updates, and at their position.
      step_fn: dispatches one update.
      log: called with (step, batch number, metrics) after the next dispatch, or sooner.
      resume_clock: called after actions, which do not count as step time.
      stop, requests: both are polled before every step.
      phases: counts the time of each part.
      ends: whether a step is the last one; an evaluation at this step may decide it.
      beside: its context waits for the first step; its time is no step time.
      at_once: a step is logged when `step_fn` returns, since it is over then.

    Returns:
      The state and the number of updates it holds.
    """
    later = _DelayedLog(log, at_once)
    acts = _Acts(actions, first, phases, later, beside)
    is_last = lambda step: step == total or ends(step)  # noqa: E731
    phases.enter("compile")
    for step in range(first, total + 1):
        requested = requests.agreed()
        ending = stop.is_due() or STOP in requested
        due = acts.run(step, state, is_last, requested, ending)
        if ending or is_last(step):
            later()
            break  # The caller answers once the last save is on disk.
        if requested:
            for action in due:
                action.settle()
            requests.answer(step)
        if due or acts.put_off:
            resume_clock()
        try:
            batch = next(batches)
        except Preempted:  # In the wait for data; no process has begun the step.
            later()
            break
        state, metrics = step_fn(state, batch)
        phases.enter("step")
        acts.run_put_off(step, metrics)
        later(step + 1, batches.number, metrics)
    return state, step


class _Acts:
    """Runs the actions that are due, and puts off those that keep the first state."""

    def __init__(
        self,
        actions: Sequence[Action],
        first: int,
        phases: PhaseTimer,
        later: "_DelayedLog",
        beside: Beside,
    ):
        self._actions, self._first, self._phases = actions, first, phases
        self._later, self._beside = later, beside
        self.put_off: list[tuple[Action, State]] = []

    def run(
        self,
        step: int,
        state: State,
        is_last: Callable[[int], bool],
        requested: Collection[str],
        ending: bool,
    ) -> list[Action]:
        """Returns those that ran; one of them may decide that the step is the last."""
        ran = []
        for action in self._actions:
            last = is_last(step)
            if not action.is_due(step, self._first, last, requested):
                continue
            at_once = ending or last or requested
            if action.keep and step == self._first and not at_once:
                self.put_off.append((action, action.keep(state)))
                continue
            self._later()
            with self._phases.during(action.phase):
                action.run(step, state)
            ran.append(action)
        return ran

    def run_put_off(self, step: int, metrics: Any) -> None:
        """Runs those that were put off, once the step that gives `metrics` is made."""
        if self.put_off:
            with self._beside(metrics):
                for action, kept in self.put_off:
                    with self._phases.during(action.phase):
                        action.run(step, kept)
            self.put_off.clear()


class _DelayedLog:
    """Logs a step when it is called for the next one, or else at once."""

    def __init__(self, log: Callable[[int, int, Any], None], at_once: bool):
        self._log, self._at_once = log, at_once
        self._kept: tuple[Any, ...] = ()

    def __call__(self, *metrics: Any) -> None:
        """Logs what is kept, and keeps the arguments of `log` for the next call."""
        kept, self._kept = self._kept, metrics
        if kept:
            self._log(*kept)
        if metrics and self._at_once:
            self()
