"""Runs that take the same steps in turn, in one process: what a knob costs a step.

All sides stand beside each other and train on the same batches by turns, so that
whatever else the machine does slows all of them. A side is a config; base model and
rows are those of the first one.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
from random_step import add_knobs, knobs_of, read_config

from research.config.run_config import Config
from research.evaluate.held_out_losses import add_up
from research.formats.base_model import Base
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.tasks import task_registry
from research.tasks.task_protocol import Task
from research.train.programs.device_batches import first_batches
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition
from research.weights import parameter_paths


class Side:
    """A run that is ready to train.

    Attributes:
      name: as it is printed.
      load_s: seconds in which its parameters were loaded.
      seconds: of each step so far.
      cpu_seconds: those that CPUs gave to this process in each step.
      losses: of each `measure`, those of the held-out batches with their tokens.
    """

    def __init__(self, name: str, config: Config, base: Base, task: Task):
        self.name = name
        mesh = meshes.make_mesh(config.mesh)
        objective = task_registry.make_objective(config, mesh, len(task.groups))
        definition = make_step_definition(config, base, mesh, objective)
        begun = time.perf_counter()
        rows = functools.partial(first_batches, config, definition, task)
        params, self._frozen = load_start(definition, base, first_batches=rows)
        self.load_s = time.perf_counter() - begun
        self._state = train_step.jit_init(definition)(params)
        self._step = train_step.jit_train_step(definition)
        self._evaluate = train_step.jit_eval_step(definition)
        self._definition, self._task, self._config = definition, task, config
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[list[tuple[float, int]]] = []

    @property
    def frozen_bytes(self) -> int:
        return parameter_paths.nbytes(self._frozen)

    def temporary_bytes(self, batch: Any) -> int:
        """Bytes that the compiled step holds beside its arguments and results."""
        compiled = self._step.lower(self._state, self._frozen, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def train(self, batch: Any) -> None:
        begun, cpu = time.perf_counter(), time.process_time()
        self._state, sums = self._step(self._state, self._frozen, batch)
        jax.block_until_ready((self._state, sums))
        self.seconds.append(time.perf_counter() - begun)
        self.cpu_seconds.append(time.process_time() - cpu)

    def measure(self) -> None:
        """Adds the losses on the held-out rows to `losses`."""
        data, mesh = self._config.data, self._definition.mesh
        rows = data.rows_per_pass
        found = [
            self._evaluate(
                self._state.params,
                self._frozen,
                meshes.to_global(batch, mesh, rows=rows),
            )
            for batch in self._task.held_out(rows, meshes.local_rows(mesh, rows))
        ]
        unit = self._definition.objective.loss_unit
        groups, size = self._task.groups, self._task.held_out_bytes
        each = [add_up([one], groups, size, unit) for one in found]
        self.losses.append([(x.loss, sum(x.tokens.values())) for x in each])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `read_sides`, and `--warmup`."""
    add = parser.add_argument
    add("--config", default="configs/finetune_dolly.py")
    add("--data", default="", help="rows; by default those of the config")
    add("--steps", type=int, default=20, help="of each side")
    add("--warmup", type=int, default=2, help="first steps, whose time does not count")
    add_knobs(parser)


def read_sides(
    arguments: argparse.Namespace, sides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Config]:
    """The config of each side by name, from the knobs by path that are its own.

    Raises:
      UserError: see `read_config`.
    """
    shared = knobs_of(arguments.knob) | {"steps": arguments.steps}
    if arguments.data:
        shared["data.path"] = arguments.data
    return {
        name: read_config(arguments.config, {**shared, **own})
        for name, own in sides.items()
    }


def train_in_turn(configs: dict[str, Config], measures: bool) -> tuple[list[Side], Any]:
    """Trains a side for each of `configs`, by name.

    Args:
      configs: alike in model, data and steps.
      measures: the losses before the first and after the last step.

    Returns:
      The sides, and the last batch.
    """
    config = next(iter(configs.values()))
    runtime.start(config.runtime)
    base = task_registry.open_start(config)
    task = task_registry.load_task(config, base)
    sides = [Side(name, own, base, task) for name, own in configs.items()]
    mesh, data = meshes.make_mesh(config.mesh), config.data
    passes = data.batch_size // data.rows_per_pass
    stream = task.batches(meshes.local_rows(mesh, data.batch_size, passes))
    for side in sides if measures else ():
        side.measure()
    for number in range(config.steps):
        batch = meshes.to_global(next(stream), mesh, passes, data.batch_size)
        # Each round begins with another one.
        first = number % len(sides)
        for side in sides[first:] + sides[:first]:
            side.train(batch)
    for side in sides if measures else ():
        side.measure()
    return sides, batch


def speed(first: Sequence[float], seconds: Sequence[float]) -> str:
    """The seconds of a step, and how fast it is against those of `first`."""
    median = statistics.median(seconds)
    ratio = statistics.median(x / y for x, y in zip(first, seconds, strict=True))
    against = statistics.median(first) / median
    return f"step {median:.3f} s, speed {against:.2f} (by pairs {ratio:.2f})"
