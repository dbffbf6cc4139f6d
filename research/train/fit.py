"""From a prepared run to its last step: restore, loop, save, and go on after a NaN."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import Config
from research.core.errors import DamagedError, DivergedError, SaveError, UserError
from research.engine.sampler import Sampler
from research.engine.text_generation import tuned_generator
from research.formats.base_model import Base
from research.parallel import mesh, runtime
from research.runs import display_files
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.runs.steering.control_requests import CHECKPOINT, SAMPLE
from research.runs.steering.request_listener import RequestListener
from research.runs.steering.stop_signals import StopRequest
from research.tasks.task_protocol import Task
from research.train import loop, profiling, throughput
from research.train.device_batches import Feed
from research.train.doctor import Examination
from research.train.evaluation import evaluate
from research.train.metrics_log import StepLog
from research.train.step import train_step
from research.train.step.definition_from_config import load_start

NOTE_EVERY = 10.0  # seconds between the updates of run.json


@dataclasses.dataclass
class Run:
    """A run that has passed its doctor: everything the loop needs.

    Attributes:
      evaluated: step and loss of the last evaluation, what `keep_best` judges by.
    """

    config: Config
    folder: RunDir
    base: Base
    task: Task
    definition: train_step.StepDefinition
    sampler: Sampler
    state: train_step.TrainState | None
    frozen: dict[str, Any]
    examination: Examination
    console: Console
    phases: PhaseTimer
    history: History
    evaluated: tuple[int, float] | None = None


def fit(
    run: Run,
    checkpointer: Checkpointer,
    stop: StopRequest,
    restored: Callable[[], None],
) -> int:
    """Trains to the last step, or until a signal; returns the updates made in all.

    `restored` is called when the state is there, before anything is written.

    Raises:
      DivergedError: a number was not finite, more often than `optim.rollbacks`.
      SaveError: a checkpoint or a metric could not be written.
      DamagedError: there were checkpoints, and none can be used.
    """
    while True:
        try:
            return _fit_once(run, checkpointer, stop, restored)
        except DivergedError as error:
            made = len(run.history.skipped)
            if made >= run.config.optim.rollbacks:
                raise
            run.history.note(error.step - 1)
            run.history.skip(error.batch)
            tell(
                run,
                f"step {error.step} was not finite: back to the last checkpoint, and "
                f"on without batch {error.batch} (rollback {made + 1} of "
                f"config.optim.rollbacks={run.config.optim.rollbacks})",
            )
            checkpointer.wait()
            run.state = None


def tell(run: Run, what: str) -> None:
    """Says it, and keeps it in the run's history."""
    logging.warning("%s", what)
    run.history.event(what)


def _fit_once(
    run: Run,
    checkpointer: Checkpointer,
    stop: StopRequest,
    restored: Callable[[], None],
) -> int:
    config = run.config
    first, position = restore(run, checkpointer)
    restored()
    if not first:
        run.evaluated = None
    clock = throughput.Clock((position or {"elapsed": 0.0})["elapsed"])
    log = StepLog(
        config,
        run.folder.path,
        run.console,
        clock,
        count_flops(run),
        run.task.groups,
        first,
        run.phases,
    )
    feed = make_feed(run, stop, position)
    run.history.resume_from(first)
    saver = Saver(run, checkpointer, log, feed, clock)
    answered = {run.folder.path: run.history.answer_request}
    with (
        RequestListener(answered, run.definition.mesh) as requests,
        stop.noting(),
        profiling.trace_steps(
            make_step(run), run.folder.path, first, config.runtime
        ) as step_fn,
    ):
        try:
            run.state, done = loop.run(
                state=run.state,
                first=first,
                total=config.steps,
                feed=feed,
                step_fn=step_fn,
                actions=make_actions(run, log, saver),
                log=saver.watching(log),
                resume_clock=clock.resume,
                stop=stop,
                requests=requests,
                phases=run.phases,
            )
            with run.phases.during("save"):
                saver.finish(done, run.state)
            requests.answer(done)
        finally:
            log.close()
    return done


def make_actions(run: Run, log: StepLog, saver: "Saver") -> list[loop.Action]:
    """The things done between steps, in their order."""
    config = run.config
    return [
        loop.Action("evaluate", config.eval.every, make_evaluation(run, log), True),
        loop.Action(
            "save",
            config.checkpoint.every,
            saver,
            request=CHECKPOINT,
            settle=saver.wait,
        ),
        # After the save: a sample that fails must not cost a step.
        loop.Action(
            "sample",
            config.eval.samples_every or config.steps,
            make_sampling(run),
            request=SAMPLE,
        ),
    ]


def restore(run: Run, checkpointer: Checkpointer) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest intact checkpoint into `run.state`; returns its step, position.

    Step 0 only where nothing was ever saved: whoever takes a loss of all checkpoints
    for a beginning overwrites what could have been rescued.
    """
    if checkpointer.latest_step is not None:
        run.state = None  # Room for the one that is read.
    restored = checkpointer.restore(train_step.abstract_state(run.definition))
    if restored:
        run.state = restored.state
        if restored.step > run.config.steps:
            raise UserError(
                f"{run.folder.path} has made {restored.step} steps, and config.steps "
                f"is {run.config.steps}: give at least {restored.step}"
            )
        return restored.step, restored.position
    if run.history.saved or checkpointer.has_set_aside:
        raise DamagedError(
            f"step {run.history.saved} was saved, as {run.folder.history} says, and "
            f"{run.folder.checkpoints} has no checkpoint: bring one back, or remove "
            f"{run.folder} to begin anew"
        )
    if run.state is None:
        params, run.frozen = load_start(run.definition, run.base)
        run.state = train_step.jit_init(run.definition)(params)
    return 0, None


def make_feed(run: Run, stop: StopRequest, position: dict[str, Any] | None) -> Feed:
    """This process's rows of the batches, as global arrays."""
    config, definition = run.config, run.definition
    rows, parts = config.data.batch_size, microbatches(config)
    mine = mesh.local_rows(definition.mesh, rows, parts)
    return Feed(
        run.task.batches(mine),
        lambda batch: mesh.to_global(batch, definition.mesh, parts, rows),
        run.history.skipped,
        run.phases,
        position,
        stop.wait,
    )


class Saver:
    """Saves the run's state and position, by the policy of `checkpoint.on_error`."""

    def __init__(
        self,
        run: Run,
        checkpointer: Checkpointer,
        log: StepLog,
        feed: Feed,
        clock: throughput.Clock,
    ):
        self._run = run
        self._checkpointer = checkpointer
        self._log = log
        self._feed = feed
        self._clock = clock
        self._noted = time.monotonic()
        # What one process cannot write, the others may have written: no going on.
        self._goes_on = (
            run.config.checkpoint.on_error == "go_on" and jax.process_count() == 1
        )

    def __call__(self, number: int, state: train_step.TrainState) -> None:
        """Starts a save; one that has failed stops the run, or is told of."""
        self._tolerate(self._checkpointer.wait)
        self._tolerate(lambda: self._save(number, state))
        self._note(number)

    def wait(self) -> None:
        """Until the save in progress is on disk, or has failed and is tolerated."""
        self._tolerate(self._checkpointer.wait)

    def finish(self, number: int, state: train_step.TrainState) -> None:
        """The last save, on disk for good when this returns.

        Raises:
          SaveError: it is not, whatever the policy: there is nothing to go on with.
        """
        self._tolerate(self._checkpointer.wait)
        self._save(number, state)
        self._checkpointer.wait()
        self._note(number)

    def watching(
        self, log: Callable[[int, int, train_step.Metrics], None]
    ) -> Callable[[int, int, train_step.Metrics], None]:
        """`log`, and a look after the save that goes on meanwhile."""

        def logged(number: int, batch: int, sums: train_step.Metrics) -> None:
            log(number, batch, sums)
            self._tolerate(self._checkpointer.check)
            if time.monotonic() - self._noted > NOTE_EVERY:
                self._note(number)

        return logged

    def _save(self, number: int, state: train_step.TrainState) -> None:
        # A checkpoint must never know more than the metrics beside it.
        self._log.sync()
        position = self._feed.position | {"elapsed": self._clock.elapsed}
        known, loss = self._run.evaluated or (-1, None)
        # Only a loss of these very parameters says how good they are, and NaN nothing.
        judged = known == number and loss is not None and math.isfinite(loss)
        eval_loss = loss if judged else None
        self._checkpointer.save(number, state, position, eval_loss)

    def _tolerate(self, action: Callable[[], None]) -> None:
        try:
            action()
        except SaveError as error:
            if not self._goes_on:
                raise
            tell(self._run, f"{error} (going on: config.checkpoint.on_error)")

    def _note(self, number: int) -> None:
        self._noted = time.monotonic()
        self._run.history.note(number)


def make_step(run: Run) -> profiling.StepFn:
    """The train step over this run's frozen parameters; its first call is announced."""
    jitted = runtime.announce_first_call(
        train_step.jit_train_step(run.definition), "first step"
    )
    return lambda state, batch: jitted(state, run.frozen, batch)


def microbatches(config: Config) -> int:
    """Forward passes per optimizer step."""
    return config.data.batch_size // config.data.rows_per_pass


def count_flops(run: Run) -> throughput.FlopCount:
    """What a step of this run needs, for MFU."""
    return throughput.count_flops(
        run.base.architecture,
        trained=sum(x.size for x in jax.tree.leaves(run.state.params)),
        full=not run.frozen,
    )


Action = Callable[[int, train_step.TrainState], None]


def make_evaluation(run: Run, log: StepLog) -> Action:
    """The action that evaluates all held-out rows and logs the result."""
    rows = run.config.data.rows_per_pass
    local = run.task.held_out(rows, mesh.local_rows(run.definition.mesh, rows))
    batches = [mesh.to_global(batch, run.definition.mesh, rows=rows) for batch in local]
    eval_fn = train_step.jit_eval_step(run.definition)

    def action(number: int, state: train_step.TrainState) -> None:
        found = evaluate(
            lambda batch: eval_fn(state.params, run.frozen, batch),
            batches,
            run.task.groups,
            run.task.held_out_bytes,
            run.phases.sign_of_life,
        )
        run.evaluated = (number, found.loss)
        log.evaluation(number, found)

    return action


def make_sampling(run: Run) -> Action:
    """The action that adds the task's samples to the run directory."""

    def action(number: int, state: train_step.TrainState) -> None:
        generator = tuned_generator(
            run.sampler,
            run.definition.trainable,
            state.params,
            run.frozen,
            run.base.tokenizer,
        )
        samples = run.task.sample(number, generator)
        if samples and jax.process_index() == 0:
            display_files.add_samples(run.folder.path, number, samples)

    return action
