"""From prepared runs at one step to their last step: restore, loop, evaluate, save.

One run is a pack of one: everything here works on a list of runs, and the program
(`SingleRunProgram` or `PackProgram`) hides how they share the devices.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.checkpoints.checkpointer import Checkpointer
from research.core.errors import DamagedError, DivergedError, UserError
from research.engine.text_generation import tuned_generator
from research.parallel import runtime
from research.runs import display_files
from research.runs.steering.control_requests import CHECKPOINT, SAMPLE
from research.runs.steering.request_listener import RequestListener
from research.runs.steering.stop_signals import StopRequest
from research.train import training_loop
from research.train.metrics import profiling
from research.train.metrics.metrics_log import StepLog
from research.train.metrics.throughput import Clock, SharedClock
from research.train.programs.pack_program import PackProgram
from research.train.programs.single_run_program import SingleRunProgram
from research.train.run_saver import RunSaver
from research.train.step import train_step
from research.train.step.definition_from_config import load_start
from research.train.training_run import TrainingRun

Position = dict[str, Any]


@dataclasses.dataclass
class PackMember:
    """A restored run among those that train together.

    Attributes:
      position: where its data resumes; None at the start.
      diverged: why it takes no further part. Its slot of the program stays unused.
    """

    run: TrainingRun
    checkpointer: Checkpointer
    position: Position | None
    diverged: DivergedError | None = None


def restore(
    run: TrainingRun, checkpointer: Checkpointer
) -> tuple[int, Position | None]:
    """Puts the newest intact checkpoint into `run.state`.

    Returns step 0 only where nothing was ever saved: taking the loss of all checkpoints
    for a fresh start would overwrite what could still be rescued.

    Returns:
      The step of the checkpoint and the position of its data.

    Raises:
      UserError: it has made more steps than `config.steps`.
      DamagedError: there were checkpoints, and none can be used.
    """
    if checkpointer.latest_step is not None:
        run.state = None  # Room for the one that is read.
    restored = checkpointer.restore(train_step.abstract_state(run.definition))
    if restored:
        run.state = restored.state
        if restored.step > run.config.steps:
            raise UserError(
                f"{run.folder.path} has made {restored.step} steps, and config.steps "
                f"is {run.config.steps}: set it to at least {restored.step}"
            )
        return restored.step, restored.position
    if run.history.saved or checkpointer.has_set_aside:
        raise DamagedError(
            f"step {run.history.saved} was saved, as {run.folder.history} says, and "
            f"{run.folder.checkpoints} has no checkpoint: bring one back, or remove "
            f"{run.folder.path} to begin anew"
        )
    if run.state is None:
        params, run.frozen = load_start(run.definition, run.base)
        run.state = train_step.jit_init(run.definition)(params)
    return 0, None


def fit(
    members: Sequence[PackMember], first: int, stop: StopRequest, at_once: int = 0
) -> int:
    """Trains runs that have made `first` steps, until the last step or a stop.

    A lone run that diverges returns to its last checkpoint and drops the batch, up to
    `optim.rollbacks` times. In a pack a run that diverges only leaves the others.

    Returns:
      The number of updates made in all. The `state` of every run that has not diverged
      is then its last one.

    Raises:
      DivergedError: the loss or gradient of a lone run was not finite too often.
      SaveError: a checkpoint or a metric could not be written.
    """
    while True:
        try:
            return _Fit(members, first, stop, at_once).run()
        except DivergedError as error:
            run, checkpointer = members[0].run, members[0].checkpointer
            made, allowed = len(run.history.skipped), run.config.optim.rollbacks
            if len(members) > 1 or made >= allowed:
                raise
            run.history.note(error.step - 1)
            run.history.skip(error.batch)
            run.warn(
                f"step {error.step} was not finite: training returns to the last "
                f"checkpoint and drops batch {error.batch} (rollback {made + 1} of "
                f"config.optim.rollbacks={allowed})"
            )
            checkpointer.wait()
            run.state = None
            first, members[0].position = restore(run, checkpointer)


class _Fit:
    """One pass of the loop over the runs, and what is written down of it."""

    def __init__(
        self,
        members: Sequence[PackMember],
        first: int,
        stop: StopRequest,
        at_once: int,
    ):
        self._members, self._first, self._stop = members, first, stop
        runs = [member.run for member in members]
        positions = [member.position for member in members]
        if len(runs) == 1:
            self._program = SingleRunProgram(runs[0], positions[0], stop)
        else:
            self._program = PackProgram(runs, positions, stop, at_once)
        self._config, self._phases = runs[0].config, runs[0].phases
        self._clock = Clock()
        self._last = first
        self._logs: list[StepLog] = []
        self._savers: list[RunSaver] = []
        for index, member in enumerate(members):
            self._add_writers(index, member)

    def _add_writers(self, index: int, member: PackMember) -> None:
        run, count = member.run, len(self._members)
        if not self._first:
            run.evaluated = None
        clock = SharedClock(
            self._clock, count, (member.position or {"elapsed": 0.0})["elapsed"]
        )
        log = StepLog(
            run.config,
            run.folder.path,
            run.console,
            clock,
            run.count_flops(),
            run.task.groups,
            self._first,
            run.phases,
            Path(run.config.run_dir).name if count > 1 else "",
        )
        self._logs.append(log)
        self._savers.append(
            RunSaver(
                run,
                member.checkpointer,
                log,
                lambda: self._program.positions[index],
                clock,
            )
        )

    def _active(self) -> list[tuple[int, PackMember]]:
        return [(i, m) for i, m in enumerate(self._members) if not m.diverged]

    def run(self) -> int:
        """Trains; returns the number of updates made in all."""
        runs = [member.run for member in self._members]
        for run in runs:
            run.history.resume_from(self._first)
        answered = {run.folder.path: run.history.answer_request for run in runs}
        step_fn = runtime.announce_first_call(self._program.make_step(), "first step")
        folder, config = runs[0].folder.path, self._config
        with (
            RequestListener(answered, runs[0].definition.mesh) as requests,
            self._stop.noting(),
            profiling.trace_steps(
                step_fn, folder, self._first, config.runtime
            ) as traced,
        ):
            try:
                state, done = training_loop.run(
                    state=self._program.initial_state(),
                    first=self._first,
                    total=config.steps,
                    batches=self._program.batches,
                    step_fn=traced,
                    actions=self._actions(),
                    log=self._log,
                    resume_clock=self._clock.resume,
                    stop=self._stop,
                    requests=requests,
                    phases=self._phases,
                )
                with self._phases.during("save"):
                    self._save_last(done, state)
                requests.answer(done)
            except DivergedError:
                if len(runs) == 1 or self._active():
                    raise
                done = self._last
            finally:
                for log in self._logs:
                    log.close()
        return done

    def _actions(self) -> list[training_loop.Action]:
        """The things done between steps, in their order."""
        config, action = self._config, training_loop.Action
        samples_every = config.eval.samples_every or config.steps
        return [
            action("evaluate", config.eval.every, self._evaluation(), at_start=True),
            action(
                "save",
                config.checkpoint.every,
                self._save,
                request=CHECKPOINT,
                settle=self._wait_for_saves,
            ),
            # After the save: a sample that fails must not cost a step.
            action("sample", samples_every, self._sample, request=SAMPLE),
        ]

    def _log(self, number: int, batch: int, metrics: train_step.Metrics) -> None:
        """Writes the metrics of update `number`, made from batch `batch`."""
        fetched = jax.tree.map(np.asarray, metrics)
        self._clock.tick()
        self._last = number
        for index, member in self._active():
            own = self._program.metrics_of(index, fetched)
            try:
                self._logs[index](number, batch, own)
            except DivergedError as error:
                if len(self._members) == 1:
                    raise
                logging.error("%s: %s", member.run.config.run_dir, error)
                member.diverged = error
                if not self._active():
                    raise
                continue
            self._savers[index].check(number)

    def _evaluation(self) -> Callable[[int, train_step.TrainState], None]:
        evaluate = self._program.make_evaluation()

        def evaluation(number: int, state: train_step.TrainState) -> None:
            results = evaluate(number, state)
            for index, member in self._active():
                member.run.evaluated = (number, results[index].loss)
                self._logs[index].evaluation(number, results[index])

        return evaluation

    def _save(self, number: int, state: train_step.TrainState) -> None:
        for index, _ in self._active():
            self._savers[index](number, self._program.state_of(index, state))

    def _wait_for_saves(self) -> None:
        for index, _ in self._active():
            self._savers[index].wait()

    def _save_last(self, done: int, state: train_step.TrainState) -> None:
        for index, member in self._active():
            member.run.state = self._program.state_of(index, state)
            self._savers[index].finish(done, member.run.state)

    def _sample(self, number: int, state: train_step.TrainState) -> None:
        """Adds the task's samples to the run directory."""
        for index, member in self._active():
            run, own = member.run, self._program.state_of(index, state)
            generator = tuned_generator(
                run.sampler,
                run.definition.trainable,
                own.params,
                run.frozen,
                run.base.tokenizer,
            )
            samples = run.task.sample(number, generator)
            if samples and jax.process_index() == 0:
                display_files.add_samples(run.folder.path, number, samples)
