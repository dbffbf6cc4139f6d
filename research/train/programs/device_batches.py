"""Batches on the devices: one per run and step, and the positions to resume from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from research.config.run_config import Config
from research.data.token_batch import Batch
from research.parallel import agreement, mesh
from research.runs.lineage.proof_rows import keep_rows
from research.tasks.task_protocol import Task
from research.train.step.train_step import StepDefinition
from research.train.training_run import TrainingRun

Position = dict[str, Any]
ToDevices = Callable[[Sequence[Batch], bool], Any]
Wait = Callable[[Callable[[], Any]], Any]


class DeviceBatches:
    """Numbers the batches of each run, and drops those that its history skips.

    Attributes:
      positions: for each run the JSON-able position of the first batch that was not
        handed out. They move together.
      number: of the first run's last batch that was handed out, counted from 0.
    """

    def __init__(
        self,
        runs: Sequence[TrainingRun],
        positions: Sequence[Position | None],
        to_devices: ToDevices,
        wait: Wait = lambda pull: pull(),
    ):
        """Args:
        runs: they share the mesh and the shape of a batch.
        positions: where each run's data resumes; None for the beginning.
        to_devices: makes one batch for the step from a host batch of each run.
        wait: calls the function that waits for data, and may interrupt it, see
          `StopRequest`.
        """
        first = runs[0]
        rows = mesh.local_rows(
            first.definition.mesh, first.config.data.batch_size, first.microbatches
        )
        self._streams = [run.task.batches(rows) for run in runs]
        for stream in self._streams:
            stream.alive = first.phases.sign_of_life
        self._skips = [frozenset(run.history.skipped) for run in runs]
        self._pulled = [(position or {"pulled": 0})["pulled"] for position in positions]
        for stream, position in zip(self._streams, positions, strict=True):
            if position is not None:
                stream.set_state(position["data"])
        self._to_devices, self._wait, self._phases = to_devices, wait, first.phases
        self.positions = self._positions()

    @property
    def number(self) -> int:
        return self.positions[0]["pulled"] - 1

    def whole_position(self, index: int) -> Position:
        """The position of run `index`, with what only other processes know of it.

        All processes call it, at the same step.
        """
        own = self.positions[index]
        data = self._streams[index].joined(own["data"], agreement.union)
        return own | {"data": data}

    def __next__(self) -> Any:
        with self._phases.during("data"):
            batches = self._wait(lambda: [*map(self._pull, range(len(self._streams)))])
            positions = self._positions()
            batch = self._to_devices(batches, False)
        # Only here: a signal that interrupts the wait leaves the streams somewhere
        # between two batches. From here on none is raised.
        self.positions = positions
        return batch

    def _pull(self, index: int) -> Batch:
        batch = next(self._streams[index])
        while self._pulled[index] in self._skips[index]:
            self._pulled[index] += 1
            batch = next(self._streams[index])
        self._pulled[index] += 1
        return batch

    def _positions(self) -> list[Position]:
        return [
            {"data": stream.get_state(), "pulled": pulled}
            for stream, pulled in zip(self._streams, self._pulled, strict=True)
        ]


def place_batch(run: TrainingRun, batch: Batch, held_out: bool) -> Batch:
    """A host batch of `run` on its mesh.

    Returns:
      `[microbatch, batch, seq]` for the step, `[batch, seq]` for held-out rows.
    """
    devices, data = run.definition.mesh, run.config.data
    if held_out:
        return mesh.to_global(batch, devices, rows=data.rows_per_pass)
    return mesh.to_global(batch, devices, run.microbatches, data.batch_size)


def first_batches(
    config: Config, definition: StepDefinition, task: Task
) -> list[Batch]:
    """The batches that a run begins with, on its devices, for adapters of kind EVA.

    `task` gives them once more when training begins.
    """
    devices, data = definition.mesh, config.data
    rows = mesh.local_rows(devices, data.batch_size, data.passes_per_step)
    stream = task.batches(rows)
    return [
        mesh.to_global(next(stream), devices, data.passes_per_step, data.batch_size)
        for _ in range(config.lora.eva_batches)
    ]


def held_out_batches(runs: Sequence[TrainingRun], to_devices: ToDevices) -> list[Any]:
    """The batches that hold all held-out rows of every run.

    A run with fewer than the others repeats its last one, with no weight.
    """
    first = runs[0]
    rows = first.config.data.rows_per_pass
    mine = mesh.local_rows(first.definition.mesh, rows)
    every = [run.task.held_out(rows, mine) for run in runs]
    if jax.process_index() == 0:
        for run, own in zip(runs, every, strict=True):
            if own:
                keep_rows(run.folder.path, own[0])

    def take(own: Sequence[Batch], number: int) -> Batch:
        if number < len(own):
            return own[number]
        return dataclasses.replace(own[-1], weights=np.zeros_like(own[-1].weights))

    return [
        to_devices([take(own, number) for own in every], True)
        for number in range(max(map(len, every)))
    ]
