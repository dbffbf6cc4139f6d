"""One run as the training loop sees it: batches, step, evaluation; nothing stacked."""

from collections.abc import Callable
from typing import Any

from research.parallel import mesh
from research.runs.steering.stop_signals import StopRequest
from research.train.metrics.evaluation import Evaluation, evaluate
from research.train.programs.device_batches import DeviceBatches
from research.train.step import train_step
from research.train.training_run import TrainingRun


class SingleRunProgram:
    """The program of one run. `pack.PackProgram` has the same methods for many.

    Attributes:
      batches: device batches, positioned at the first step.
    """

    def __init__(
        self, run: TrainingRun, position: dict[str, Any] | None, stop: StopRequest
    ):
        """`position` is where the data resumes; None for the beginning."""
        self._run = run
        config, devices = run.config, run.definition.mesh
        rows, parts = config.data.batch_size, run.microbatches
        self.batches = DeviceBatches(
            run.task.batches(mesh.local_rows(devices, rows, parts)),
            lambda batch: mesh.to_global(batch, devices, parts, rows),
            run.history.skipped,
            run.phases,
            position,
            stop.wait,
        )

    @property
    def positions(self) -> list[dict[str, Any]]:
        """Where each run's data resumes after the last batch that was handed out."""
        return [self.batches.position]

    def initial_state(self) -> train_step.TrainState:
        return self._run.state

    def make_step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The jitted update; its state is donated."""
        jitted, frozen = (
            train_step.jit_train_step(self._run.definition),
            self._run.frozen,
        )
        return lambda state, batch: jitted(state, frozen, batch)

    def make_evaluation(self) -> Callable[[int, Any], list[Evaluation]]:
        """A function of step and state that evaluates all held-out rows of each run."""
        run, devices = self._run, self._run.definition.mesh
        rows = run.config.data.rows_per_pass
        local = run.task.held_out(rows, mesh.local_rows(devices, rows))
        batches = [mesh.to_global(batch, devices, rows=rows) for batch in local]
        eval_fn = train_step.jit_eval_step(run.definition)

        def evaluation(number: int, state: train_step.TrainState) -> list[Evaluation]:
            found = evaluate(
                lambda batch: eval_fn(state.params, run.frozen, batch),
                batches,
                run.task.groups,
                run.task.held_out_bytes,
                run.phases.sign_of_life,
                run.definition.objective.loss_unit,
            )
            return [found]

        return evaluation

    def metrics_of(self, index: int, metrics: train_step.Metrics) -> train_step.Metrics:
        """The part of a step's metrics that belongs to run `index`."""
        return metrics

    def state_of(
        self, index: int, state: train_step.TrainState
    ) -> train_step.TrainState:
        """The part of the state that belongs to run `index`."""
        return state
