"""How a run saves: what a save holds, and the policy of `checkpoint.on_error`."""

import time
from collections.abc import Callable
from typing import Any

import jax

from research.checkpoints.checkpoint_listing import LOSS
from research.checkpoints.checkpointer import Checkpointer
from research.core.errors import SaveError, look_up
from research.train.metrics import throughput
from research.train.metrics.metrics_log import StepLog
from research.train.step import train_step
from research.train.training_run import TrainingRun

NOTE_EVERY = 10.0  # seconds between the updates of run.json


class RunSaver:
    """Saves the run's state and position, by the policy of `checkpoint.on_error`."""

    def __init__(
        self,
        run: TrainingRun,
        checkpointer: Checkpointer,
        log: StepLog,
        position: Callable[[], dict[str, Any]],
        clock: throughput.Clock,
    ):
        self._run = run
        self._checkpointer = checkpointer
        self._log = log
        self._position = position
        self._clock = clock
        self._noted = time.monotonic()
        # The other processes may have written what this one could not: it must stop.
        on_error = run.config.checkpoint.on_error
        goes_on = look_up(
            {"go_on": True, "stop": False}, on_error, "config.checkpoint.on_error"
        )
        self._continues = goes_on and jax.process_count() == 1

    def __call__(self, number: int, state: train_step.TrainState) -> None:
        """Starts a save. A failed one stops the run, or is only logged."""
        self._tolerate(self._checkpointer.wait)
        self._tolerate(lambda: self._save(number, state))
        self._note(number)

    def is_best(self, number: int) -> bool:
        """Whether step `number` is not saved and is among the best so far."""
        loss, cost = self._measured(number)
        ranked = loss if self._run.config.checkpoint.best_by == LOSS else cost
        return ranked is not None and self._checkpointer.is_among_best(number, ranked)

    def wait(self) -> None:
        """Until the save in progress is on disk, or has failed and is tolerated."""
        self._tolerate(self._checkpointer.wait)

    def finish(self, number: int, state: train_step.TrainState) -> None:
        """Saves for the last time, and waits until the checkpoint is on disk.

        Raises:
          SaveError: it could not be saved. `checkpoint.on_error` is ignored, because no
            later save could replace this one.
        """
        self._tolerate(self._checkpointer.wait)
        self._save(number, state)
        self._checkpointer.wait()
        self._note(number)

    def check(self, number: int) -> None:
        """Learns of a save that has ended, after update `number`; never waits."""
        self._tolerate(self._checkpointer.check)
        if time.monotonic() - self._noted > NOTE_EVERY:
            self._note(number)

    def _save(self, number: int, state: train_step.TrainState) -> None:
        # The metrics reach the disk before a checkpoint that counts their steps.
        self._log.sync()
        position = self._position() | {"elapsed": self._clock.elapsed}
        self._checkpointer.save(number, state, position, *self._measured(number))

    def _measured(self, number: int) -> tuple[float | None, float | None]:
        """The held-out loss of exactly the parameters of step `number`, if known, and
        the cost of their answers.
        """
        run = self._run
        step, loss = run.evaluated or (-1, None)
        found = run.answered
        cost = run.answers.cost(found) if found and found.step == number else None
        return loss if step == number else None, cost

    def _tolerate(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SaveError as error:
            if not self._continues:
                raise
            self._run.warn(f"{error} (training continues: config.checkpoint.on_error)")

    def _note(self, number: int) -> None:
        self._noted = time.monotonic()
        self._run.history.note(number)
