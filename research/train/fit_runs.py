"""Restored runs at one step train to their last step: evaluate, save, sample, log.

Everything here works on a list of runs. How they share the devices is the program's
matter: `SingleRunProgram`, or what `make_pack_program` gives.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.checkpoints.checkpoint_listing import LOSS
from research.core.errors import DivergedError, UserError, files_of_step
from research.engine.text_generation import TextGenerator, tuned_generator
from research.evaluate.held_out_losses import add_up, sum_batches
from research.parallel import agreement, runtime
from research.runs import display_files, metrics_file
from research.runs.control.os_signals import StopRequest
from research.runs.control.request_files import CHECKPOINT, SAMPLE
from research.runs.control.request_listener import RequestListener
from research.train import training_loop
from research.train.metrics import profiling
from research.train.metrics.loss_watch import LossWatch, resumed_watch
from research.train.metrics.metrics_log import StepLog
from research.train.metrics.throughput import Clock, SharedClock
from research.train.programs.device_batches import DeviceBatches, held_out_batches
from research.train.programs.pack_program import make_pack_program
from research.train.programs.single_run_program import SingleRunProgram
from research.train.restore_run import RestoredRun, restore
from research.train.run_saver import RunSaver
from research.train.step import train_step
from research.train.training_run import TrainingRun


def fit(
    restored: Sequence[RestoredRun], first: int, stop: StopRequest, at_once: int = 0
) -> int:
    """Trains runs that have made `first` steps, until the last step or a stop.

    A run that diverges leaves the others. A lone run first returns to its last
    checkpoint and drops the batch that did it, up to `optim.rollbacks` times.

    Returns:
      The number of updates made in all. The `state` of every run that has not diverged
      is then its last one.

    Raises:
      DivergedError: no run is left.
      SaveError: a checkpoint, a metric or a sample could not be written.
      UserError: a metric of the user fails before the first update.
    """
    while True:
        try:
            return _TrainingPass(restored, first, stop, at_once).run()
        except DivergedError as error:
            run, checkpointer = restored[0].run, restored[0].checkpointer
            made, allowed = len(run.history.skipped), run.config.optim.rollbacks
            if len(restored) > 1 or made >= allowed or error.batch is None:
                raise
            run.history.note(error.step - 1)
            run.history.skip(error.batch)
            run.warn(
                f"step {error.step} was not finite: training returns to the last "
                f"checkpoint and drops batch {error.batch} (rollback {made + 1} of "
                f"config.optim.rollbacks={allowed})"
            )
        # Not beside the error: its traceback holds the state, which must make room.
        run.state = restored[0].diverged = None
        checkpointer.wait()
        first, restored[0].position = restore(run, checkpointer)


def _has_new_data(run: TrainingRun) -> bool:
    """Whether the last evaluation was on other rows than the run has now."""
    lines = metrics_file.read_metrics(run.folder.path)
    known = [line.get("data") for line in lines if line["kind"] == "eval"]
    return bool(known and known[-1]) and known[-1] != run.measured_on


class _TrainingPass:
    """One pass of the loop over the runs, and what is written about it."""

    def __init__(
        self,
        restored: Sequence[RestoredRun],
        first: int,
        stop: StopRequest,
        at_once: int,
    ):
        self._restored, self._first, self._stop = restored, first, stop
        runs = self._runs = [each.run for each in restored]
        if len(runs) == 1:
            self._program = SingleRunProgram(runs[0])
        else:
            self._program = make_pack_program(runs, at_once)
        positions = [each.position for each in restored]
        self._batches = DeviceBatches(
            runs, positions, self._program.to_devices, stop.wait
        )
        self._config, self._phases = runs[0].config, runs[0].phases
        # Its losses before any training on it, to compare the later ones with.
        self._has_new_data = agreement.of_first(any(map(_has_new_data, runs)))
        self._clock = Clock()
        self._logs: list[StepLog] = []
        self._savers: list[RunSaver] = []
        self._watches: list[LossWatch] = []
        for index, each in enumerate(restored):
            self._add_writers(index, each)

    def _add_writers(self, index: int, each: RestoredRun) -> None:
        run, count = each.run, len(self._runs)
        if not self._first:
            run.evaluated = run.answered = None
        elapsed = (each.position or {"elapsed": 0.0})["elapsed"]
        clock = SharedClock(self._clock, count, elapsed)
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
            run.task.rows,
        )
        saver = RunSaver(
            run,
            each.checkpointer,
            log,
            lambda: self._batches.whole_position(index),
            clock,
        )
        config = run.config
        knobs = config.optim, config.eval, config.checkpoint
        self._watches.append(
            resumed_watch(run.folder.path, self._first, run.measured_on, *knobs)
        )
        self._logs.append(log)
        self._savers.append(saver)

    def _active(self) -> list[int]:
        """The indices of the runs that have not diverged."""
        return [i for i, each in enumerate(self._restored) if not each.diverged]

    def run(self) -> int:
        """Trains; returns the number of updates made in all."""
        for run in self._runs:
            run.history.resume_from(self._first)
        answered = {run.folder.path: run.history.answer_request for run in self._runs}
        step_fn = self._program.make_step()
        folder, config = self._runs[0].folder.path, self._config
        with (
            RequestListener(answered, self._runs[0].definition.mesh) as requests,
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
                    batches=self._batches,
                    step_fn=traced,
                    actions=self._actions(),
                    log=self._log,
                    resume_clock=self._resume,
                    stop=self._stop,
                    requests=requests,
                    phases=self._phases,
                    ends=self._ends,
                    beside=self._beside,
                    at_once=runtime.computes_in_this_thread(),
                )
                with self._phases.during("save"):
                    self._save_last(done, state)
                requests.answer(done)
            finally:
                for log in self._logs:
                    log.close()
        return done

    def _resume(self) -> None:
        """The next step begins, with the memory that actions have freed."""
        runtime.return_free_memory()
        self._clock.resume()

    @property
    def _keep(self) -> Callable[[Any], Any] | None:
        """Copies what is evaluated before any update, where that is small: adapters.

        A second copy of all parameters might find no room. And rows that a later start
        finds to be new may end the run before a step.
        """
        if self._first:
            return None
        few = all(run.definition.trainable.frozen_specs for run in self._runs)
        return self._program.keep if few else None

    @contextlib.contextmanager
    def _beside(self, metrics: train_step.Metrics) -> Iterator[None]:
        """Waits for the step that gives `metrics`, and stops the clock."""
        jax.block_until_ready(metrics)
        with self._clock.stopped():
            yield
            runtime.return_free_memory()  # Both programs are compiled now.

    def _ends(self, step: int) -> bool:
        """Whether the losses end the run at `step`; runs that share a pack have all
        their steps, see `together.compatibility`."""
        run, watch = self._runs[0], self._watches[0]
        why = watch.why_end(step, run.config.optim, run.config.eval)
        run.ended_early = why if step < run.config.steps else ""
        return bool(run.ended_early)

    def _has_dropped(self, step: int) -> bool:
        """Whether the loss of a run says that `step` is saved, which saves them all."""
        return any(self._watches[i].has_dropped(step) for i in self._active())

    def _actions(self) -> list[training_loop.Action]:
        """The actions between steps, in this order."""
        config, action = self._config, training_loop.Action
        eval_every = config.eval.every or config.steps
        answers_every = config.eval.answers_every
        actions = []
        batches = held_out_batches(self._runs, self._program.to_devices)
        if batches:
            at_start = not self._first or self._has_new_data
            evaluate = action(
                "evaluate",
                eval_every,
                self._evaluation(batches),
                at_start,
                keep=self._keep,
            )
            actions += [evaluate]
        if answers_every and any(run.answers.metrics for run in self._runs):
            at_start = not self._first
            actions += [action("evaluate", answers_every, self._answer, at_start)]
        actions += [
            action(
                "save",
                config.checkpoint.every,
                self._save,
                request=CHECKPOINT,
                settle=self._wait_for_saves,
                wanted=self._has_dropped,
            )
        ]
        if batches:
            by_loss = config.checkpoint.best_by == LOSS
            best_every = eval_every if by_loss else answers_every
            actions += [action("save", best_every, self._save_best)]
        # After the saves: a sample that fails must not cost a step.
        samples_every = config.eval.samples_every or config.steps
        actions += [action("sample", samples_every, self._sample, request=SAMPLE)]
        return actions

    def _log(self, number: int, batch: int, metrics: train_step.Metrics) -> None:
        """Writes the metrics of update `number`, made from batch `batch`."""
        fetched = jax.tree.map(np.asarray, metrics)
        self._clock.tick()

        def write(index: int) -> None:
            part = self._program.part_of(index, fetched)
            loss = self._logs[index](number, batch, part)
            drop = self._config.checkpoint.loss_drop
            self._watches[index].add(number, loss, drop)
            self._savers[index].check(number)

        self._for_each(write)

    def _for_each(self, act: Callable[[int], None]) -> None:
        """Calls `act` with each run's index; a run that diverges leaves the others.

        Raises:
          DivergedError: no run is left.
        """
        for index in self._active():
            try:
                act(index)
            except DivergedError as error:
                self._restored[index].diverged = error
                if not self._active():
                    raise
                logging.error("%s: %s", self._runs[index].config.run_dir, error)

    def _evaluation(
        self, batches: Sequence[Any]
    ) -> Callable[[int, train_step.TrainState], None]:
        eval_step = self._program.make_eval_step()

        def evaluation(number: int, state: train_step.TrainState) -> None:
            measured = self._program.measured_by(number)
            chosen = tuple(sorted(set(measured)))
            sums = sum_batches(
                lambda batch: eval_step(state, batch, chosen),
                batches,
                self._phases.sign_of_life,
            )

            def write(index: int) -> None:
                run, row = self._runs[index], chosen.index(measured[index])
                found = add_up(
                    [self._program.part_of(row, each) for each in sums],
                    run.task.groups,
                    run.task.held_out_bytes,
                    run.definition.objective.loss_unit,
                )
                run.evaluated = (number, found.loss)
                last = self._batches.number if number else None
                self._logs[index].evaluation(number, found, last, run.measured_on)
                if number:
                    self._watches[index].evaluated = found.loss

            self._for_each(write)

        return evaluation

    def _save(self, number: int, state: train_step.TrainState) -> None:
        for index in self._active():
            self._savers[index](number, self._program.state_of(index, state))

    def _save_best(self, number: int, state: train_step.TrainState) -> None:
        """Saves all runs if one is among its best steps so far, and is not saved yet.

        All of them, because only runs at one step can resume as one program.
        """
        is_best = any(self._savers[index].is_best(number) for index in self._active())
        # A metric of the user may fail in one process alone, and all save together.
        if agreement.of_first(is_best):
            self._save(number, state)

    def _wait_for_saves(self) -> None:
        for index in self._active():
            self._savers[index].wait()

    def _save_last(self, done: int, state: train_step.TrainState) -> None:
        for index in self._active():
            run = self._runs[index]
            run.state = self._program.state_of(index, state)
            self._savers[index].finish(done, run.state)

    def _generator(self, index: int, state: train_step.TrainState) -> TextGenerator:
        """A run's model as it is now."""
        run, own = self._runs[index], self._program.state_of(index, state)
        tokenizer = run.base.tokenizer
        return tuned_generator(
            run.decoders, run.alike, own.params, run.frozen, tokenizer
        )

    def _answer(self, number: int, state: train_step.TrainState) -> None:
        """Measures the answers to the held-out rows.

        Raises:
          UserError: a metric fails before the first update, when nothing is lost.
        """
        for index in self._active():
            run = self._runs[index]
            found = run.answers.answer(number, self._generator(index, state))
            if found.problems and not number:
                raise UserError(found.problems[0])
            for problem in found.problems:
                run.warn(problem)
            run.answered = found
            values = run.answers.values(found)
            self._logs[index].answers(number, len(found.rows), values)

    def _sample(self, number: int, state: train_step.TrainState) -> None:
        """Adds the task's samples to the run directory."""
        for index in self._active():
            run = self._runs[index]
            samples = run.task.sample(number, self._generator(index, state))
            if samples and jax.process_index() == 0:
                with files_of_step(number, f"the samples of step {number}"):
                    display_files.add_samples(run.folder.path, number, samples)
