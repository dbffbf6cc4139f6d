"""The program of one run: its step and its evaluation as they are, nothing stacked."""

from collections.abc import Callable, Sequence
from typing import Any

from research.data.metric_sums import Sums
from research.data.token_batch import Batch
from research.parallel import runtime
from research.train.programs.device_batches import place_batch
from research.train.step import train_step
from research.train.training_run import TrainingRun


class SingleRunProgram:
    """The program of one run. `pack_program` has the same methods for several."""

    def __init__(self, run: TrainingRun):
        self._run = run

    def to_devices(self, batches: Sequence[Batch], held_out: bool) -> Batch:
        """One batch for the step or the evaluation, from a host batch of each run."""
        (batch,) = batches
        return place_batch(self._run, batch, held_out)

    def initial_state(self) -> train_step.TrainState:
        """The state to train, on the devices."""
        return self._run.state

    def make_step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The jitted update of (state, batch); the state is donated."""
        frozen = self._run.frozen
        jitted = runtime.announce_first_call(
            train_step.jit_train_step(self._run.definition), "first step"
        )
        return lambda state, batch: jitted(state, frozen, batch)

    def make_eval_step(self) -> Callable[[Any, Any, tuple[int, ...]], Sums]:
        """The jitted sums of (state, held-out batch, indices of the runs to measure).

        `part_of(row, ...)` is then the sums of the run whose index is at `row`.
        """
        frozen = self._run.frozen
        jitted = train_step.jit_eval_step(self._run.definition)
        return lambda state, batch, chosen: jitted(state.params, frozen, batch)

    def measured_by(self, number: int) -> list[int]:
        """For each run the index of the run whose evaluation at `number` it takes."""
        return [0]

    def keep(self, state: train_step.TrainState) -> train_step.TrainState:
        """A copy of what an evaluation reads, which the next step does not donate."""
        return train_step.keep_params(state)

    def part_of(self, row: int, arrays: Any) -> Any:
        """The part of metrics or sums that belongs to the run at `row`."""
        return arrays

    def state_of(
        self, index: int, state: train_step.TrainState
    ) -> train_step.TrainState:
        """The part of the state that belongs to run `index`."""
        return state
