"""LoRA over a base in codes against LoRA over the same base in bfloat16.

    python tests/bench/quantised_base.py --data=dolly-15k.jsonl.gz

The real model, real rows and the real step. All sides stand in one process and take
their steps in turn, on the same batches, so that whatever else the machine does slows
all of them. Prints for each value of `config.model.quantize` the seconds of a step
(median), its speed against the first side, the bytes of the frozen weights, those that
the compiled step holds beside its arguments, and the held-out loss before the first and
after the last step.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
from random_step import read_config, value_of

from research.config import command_line
from research.config.run_config import Config
from research.evaluate.held_out_losses import add_up
from research.formats.base_model import Base
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.tasks import task_registry
from research.tasks.task_protocol import Task
from research.train.step import train_step
from research.train.step.definition_from_config import load_start, make_step_definition
from research.weights import parameter_paths


class Side:
    """A run with one form of the frozen weights."""

    def __init__(self, config: Config, base: Base, task: Task, quantize: str):
        self.name = quantize
        model = dataclasses.replace(config.model, quantize=quantize)
        config = dataclasses.replace(config, model=model)
        mesh = meshes.make_mesh(config.mesh)
        objective = task_registry.make_objective(config, mesh, len(task.groups))
        definition = make_step_definition(config, base, mesh, objective)
        begun = time.perf_counter()
        params, self._frozen = load_start(definition, base)
        self.load_s = time.perf_counter() - begun
        self._state = train_step.jit_init(definition)(params)
        self._step = train_step.jit_train_step(definition)
        self._evaluate = train_step.jit_eval_step(definition)
        self._definition, self._task, self._config = definition, task, config
        self.seconds: list[float] = []
        self.losses: list[float] = []

    @property
    def frozen_bytes(self) -> int:
        return parameter_paths.nbytes(self._frozen)

    def temporary_bytes(self, batch: Any) -> int:
        """Bytes that the compiled step holds beside its arguments and results."""
        compiled = self._step.lower(self._state, self._frozen, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def train(self, batch: Any) -> None:
        begun = time.perf_counter()
        self._state, sums = self._step(self._state, self._frozen, batch)
        jax.block_until_ready((self._state, sums))
        self.seconds.append(time.perf_counter() - begun)

    def measure(self) -> None:
        """Adds the loss on the held-out rows to `losses`."""
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
        self.losses.append(add_up(found, groups, size, unit).loss)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/finetune_dolly.py")
    add("--data", default="", help="rows; by default those of the config")
    add("--sides", default="none,int8,nf4", help="values of config.model.quantize")
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=2, help="first steps, whose time does not count")
    add("--knob", action="append", default=[], metavar="PATH=VALUE")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv[1:])
    given = dict(pair.partition("=")[::2] for pair in arguments.knob)
    changes = {knob: value_of(text) for knob, text in given.items()}
    changes |= {"steps": arguments.steps}
    if arguments.data:
        changes["data.path"] = arguments.data
    config = read_config(arguments.config, changes)
    runtime.start(config.runtime)
    base = task_registry.open_start(config)
    task = task_registry.load_task(config, base)
    sides = [Side(config, base, task, x) for x in arguments.sides.split(",")]
    mesh, data = meshes.make_mesh(config.mesh), config.data
    passes = data.batch_size // data.rows_per_pass
    stream = task.batches(meshes.local_rows(mesh, data.batch_size, passes))
    for side in sides:
        side.measure()
    for number in range(arguments.steps):
        batch = meshes.to_global(next(stream), mesh, passes, data.batch_size)
        # By turns, and each round begins with another one.
        first = number % len(sides)
        for side in sides[first:] + sides[:first]:
            side.train(batch)
    for side in sides:
        side.measure()
    report(sides, batch, arguments.warmup)


def report(sides: Sequence[Side], batch: Any, warmup: int) -> None:
    first = sides[0]
    medians = [statistics.median(side.seconds[warmup:]) for side in sides]
    for side, median in zip(sides, medians, strict=True):
        pairs = zip(first.seconds[warmup:], side.seconds[warmup:], strict=True)
        ratio = statistics.median(x / y for x, y in pairs)
        start, end = side.losses
        print(
            f"{side.name:5} step {median:.3f} s, speed {medians[0] / median:.2f} "
            f"(by pairs {ratio:.2f}), loaded in {side.load_s:.1f} s, "
            f"frozen {side.frozen_bytes / 1e6:.1f} MB "
            f"({side.frozen_bytes / first.frozen_bytes:.3f}), "
            f"temporary {side.temporary_bytes(batch) / 1e6:.0f} MB, held-out loss "
            f"{start:.4f} -> {end:.4f} ({end / first.losses[-1] - 1:+.2%})",
            flush=True,
        )


if __name__ == "__main__":
    command_line.run(main)
