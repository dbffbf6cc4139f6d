"""Several LoRA runs at one step as one program: padded adapters, stacked state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.runs.steering.stop_signals import StopRequest
from research.tasks import task_registry
from research.train.metrics.evaluation import Evaluation, evaluate
from research.train.programs import pack_arrays, pack_step
from research.train.programs.device_batches import DeviceBatches
from research.train.step import train_step
from research.train.training_run import TrainingRun


class PackBatches:
    """One batch of every run at once.

    Attributes:
      positions: where each run's data resumes. They move together: a signal may come
        between the batches of two runs.
      number: of the last batch, counted from 0.
    """

    def __init__(
        self, streams: Sequence[DeviceBatches], to_devices: Callable[[Any], Any]
    ):
        self._streams, self._to_devices = streams, to_devices
        self.positions = [stream.position for stream in streams]

    @property
    def number(self) -> int:
        return self._streams[0].number

    def __next__(self) -> Any:
        batches = self._to_devices([next(stream) for stream in self._streams])
        self.positions = [stream.position for stream in self._streams]
        return batches


class PackProgram:
    """The program of several runs; `SingleRunProgram` has the same methods for one."""

    def __init__(
        self,
        runs: Sequence[TrainingRun],
        positions: Sequence[dict[str, Any] | None],
        stop: StopRequest,
        at_once: int = 0,
    ):
        """`at_once`: runs under one `vmap`; 0 chooses what suits the device."""
        self._runs = runs
        first, definition = runs[0], runs[0].definition
        configs = [run.config for run in runs]
        self._mesh, self._frozen = definition.mesh, first.frozen
        specs = definition.model.specs
        factors = pack_arrays.union(specs, configs)
        # Wide enough for the run with the most groups; those of others stay empty.
        objective = task_registry.make_objective(
            first.config, self._mesh, max(len(run.task.groups) for run in runs)
        )
        self._group = pack_step.make_group(
            first.config,
            dataclasses.replace(definition, objective=objective),
            factors,
            any(config.lora.dropout > 0 for config in configs),
            at_once,
        )
        self._own = [train_step.abstract_state(run.definition) for run in runs]
        numbers = [pack_arrays.member(config, specs, factors) for config in configs]
        everywhere = meshes.replicated(self._mesh)
        self._numbers = jax.device_put(pack_arrays.stack(numbers), everywhere)
        self._stack = {
            split: jax.jit(
                pack_arrays.stack,
                out_shardings=pack_step.batch_shardings(
                    self._group, microbatched=split
                ),
            )
            for split in (False, True)
        }
        self.batches = self._make_batches(positions, stop)

    def _make_batches(
        self, positions: Sequence[dict[str, Any] | None], stop: StopRequest
    ) -> PackBatches:
        first = self._runs[0]
        parts = first.microbatches
        mine = meshes.local_rows(self._mesh, first.config.data.batch_size, parts)
        streams = [
            DeviceBatches(
                run.task.batches(mine),
                lambda batch: batch,
                run.history.skipped,
                run.phases,
                position,
                stop.wait,
            )
            for run, position in zip(self._runs, positions, strict=True)
        ]
        return PackBatches(streams, lambda batches: self._on_mesh(batches, parts))

    def _on_mesh(self, batches: Sequence[Batch], parts: int | None = None) -> Batch:
        placed = [meshes.to_global(batch, self._mesh, parts) for batch in batches]
        return self._stack[parts is not None](placed)

    @property
    def positions(self) -> list[dict[str, Any]]:
        return self.batches.positions

    def initial_state(self) -> train_step.TrainState:
        wide = train_step.abstract_state(self._group.definition)
        shardings = pack_step.stacked(
            train_step.state_shardings(self._group.definition)
        )
        kind = self._group.definition.trainable.kind
        states = [pack_arrays.widen(run.state, wide, kind) for run in self._runs]
        return jax.device_put(pack_arrays.stack(states), shardings)

    def make_step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        jitted = pack_step.jit_train_step(self._group)
        return lambda state, batch: jitted(self._numbers, state, self._frozen, batch)

    def make_evaluation(self) -> Callable[[int, Any], list[Evaluation]]:
        rows = self._runs[0].config.data.rows_per_pass
        mine = meshes.local_rows(self._mesh, rows)
        local = [run.task.held_out(rows, mine) for run in self._runs]
        batches = [
            self._on_mesh([_nth(own, number) for own in local])
            for number in range(max(map(len, local)))
        ]
        eval_fn = pack_step.jit_eval_step(self._group)
        loss_unit = self._group.definition.objective.loss_unit

        def evaluation(number: int, state: train_step.TrainState) -> list[Evaluation]:
            measured = self._measured_by(number)
            chosen = tuple(sorted(set(measured)))
            dispatched = [
                eval_fn(self._numbers, state.params, self._frozen, batch, chosen)
                for batch in batches
            ]
            sums = []
            for each in dispatched:
                sums.append(jax.tree.map(np.asarray, each))
                self._runs[0].phases.sign_of_life()
            return [
                evaluate(
                    lambda each, row=row: jax.tree.map(lambda x: x[row], each),
                    sums,
                    run.task.groups,
                    run.task.held_out_bytes,
                    loss_unit=loss_unit,
                )
                for run, row in zip(
                    self._runs, map(chosen.index, measured), strict=True
                )
            ]

        return evaluation

    def _measured_by(self, number: int) -> list[int]:
        """For each run the index of the run whose evaluation it takes.

        Before the first step that is the first run with the same rows: adapters are an
        exact no-op then, as the doctor has checked, so all runs are the base model.
        Where all runs are one product, each is measured by itself: the others cost
        little, and no second program is compiled.
        """
        every = list(range(len(self._runs)))
        if number or self._group.at_once > 1:
            return every
        tasks = [id(run.task) for run in self._runs]
        return [tasks.index(tasks[index]) for index in every]

    def metrics_of(self, index: int, metrics: train_step.Metrics) -> train_step.Metrics:
        return jax.tree.map(lambda x: x[index], metrics)

    def state_of(
        self, index: int, state: train_step.TrainState
    ) -> train_step.TrainState:
        return pack_arrays.narrow(state, index, self._own[index])


def _nth(batches: Sequence[Batch], number: int) -> Batch:
    """Batch `number`, or one that counts nothing."""
    if number < len(batches):
        return batches[number]
    last = batches[-1]
    return dataclasses.replace(last, weights=np.zeros_like(last.weights))
