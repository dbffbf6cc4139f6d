"""The program of several LoRA runs at one step, over one frozen base."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from research.data.metric_sums import Sums
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.tasks import task_registry
from research.train.programs import pack_arrays, pack_step
from research.train.programs.device_batches import place_batch
from research.train.step import train_step
from research.train.step.train_step import TrainState
from research.train.training_run import TrainingRun


def make_pack_program(
    runs: Sequence[TrainingRun], at_once: int = 0
) -> "InTurn | Stacked":
    """`at_once`: runs under one `vmap`; 0 chooses what suits the device."""
    first, definition = runs[0], runs[0].definition
    configs = [run.config for run in runs]
    specs = definition.model.specs
    kind, factors = pack_arrays.union(specs, configs)
    # Wide enough for the run with the most groups; those of others stay empty.
    objective = task_registry.make_objective(
        first.config, definition.mesh, max(len(run.task.groups) for run in runs)
    )
    pack = pack_step.make_pack_definition(
        first.config,
        dataclasses.replace(definition, objective=objective),
        kind,
        factors,
        any(config.lora.dropout > 0 for config in configs),
        at_once,
    )
    has_factors = any(config.optim.rate_pattern for config in configs)
    everywhere = meshes.replicated(definition.mesh)
    numbers = [
        jax.device_put(
            pack_arrays.run_numbers(config, specs, factors, has_factors), everywhere
        )
        for config in configs
    ]
    return (InTurn if pack.at_once == 1 else Stacked)(runs, pack, numbers)


class _Pack:
    """The common part of both programs; `SingleRunProgram` explains each method."""

    def __init__(
        self,
        runs: Sequence[TrainingRun],
        pack: pack_step.PackDefinition,
        numbers: Sequence[pack_arrays.RunNumbers],
    ):
        self._runs, self._pack, self._frozen = runs, pack, runs[0].frozen
        self._numbers = numbers
        self._own = [train_step.abstract_state(run.definition) for run in runs]

    def _widened(self) -> list[TrainState]:
        """The states of all runs in the shapes of the pack."""
        definition = self._pack.definition
        wide, kind = train_step.abstract_state(definition), definition.trainable.kind
        return [pack_arrays.widen(run.state, wide, kind) for run in self._runs]


class InTurn(_Pack):
    """One program is called for each run; states and batches are tuples over the runs.

    All runs have padded adapters of the same shapes, so it is compiled once, and as
    fast as that of one run.
    """

    def to_devices(self, batches: Sequence[Batch], held_out: bool) -> tuple[Batch, ...]:
        pairs = zip(self._runs, batches, strict=True)
        return tuple(place_batch(*pair, held_out) for pair in pairs)

    def initial_state(self) -> tuple[TrainState, ...]:
        shardings = train_step.state_shardings(self._pack.definition)
        return tuple(jax.device_put(each, shardings) for each in self._widened())

    def make_step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        jitted = runtime.announce_first_call(
            pack_step.jit_run_step(self._pack), "first step"
        )

        def step(states: Any, batches: Any) -> tuple[Any, Any]:
            made = [
                jitted(numbers, state, self._frozen, batch)
                for numbers, state, batch in zip(
                    self._numbers, states, batches, strict=True
                )
            ]
            return tuple(zip(*made, strict=True))

        return step

    def make_eval_step(self) -> Callable[[Any, Any, tuple[int, ...]], Sequence[Sums]]:
        jitted = pack_step.jit_run_eval_step(self._pack)

        def evaluate(states: Any, batches: Any, chosen: tuple[int, ...]) -> Any:
            return [
                jitted(self._numbers[i], states[i].params, self._frozen, batches[i])
                for i in chosen
            ]

        return evaluate

    def measured_by(self, number: int) -> list[int]:
        """Before the first step, the first run with the same rows measures for a run.

        Adapters are an exact no-op then, as the doctor has checked, so all runs are the
        base model.
        """
        every = list(range(len(self._runs)))
        if number:
            return every
        tasks = [id(run.task) for run in self._runs]
        return [tasks.index(task) for task in tasks]

    def keep(self, states: tuple[TrainState, ...]) -> tuple[TrainState, ...]:
        return train_step.keep_params(states)

    def part_of(self, row: int, parts: Sequence[Any]) -> Any:
        return parts[row]

    def state_of(self, index: int, states: tuple[TrainState, ...]) -> TrainState:
        return pack_arrays.narrow(states[index], self._own[index])


class Stacked(_Pack):
    """All runs are one program, under `vmap`: every array has a leading axis."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        everywhere = meshes.replicated(self._pack.definition.mesh)
        self._all_numbers = jax.jit(pack_arrays.stack, out_shardings=everywhere)(
            self._numbers
        )
        self._stack = {
            held_out: jax.jit(
                pack_arrays.stack,
                out_shardings=pack_step.batch_shardings(
                    self._pack, microbatched=not held_out
                ),
            )
            for held_out in (False, True)
        }

    def to_devices(self, batches: Sequence[Batch], held_out: bool) -> Batch:
        pairs = zip(self._runs, batches, strict=True)
        return self._stack[held_out]([place_batch(*pair, held_out) for pair in pairs])

    def initial_state(self) -> TrainState:
        shardings = train_step.state_shardings(self._pack.definition)
        stack = jax.jit(pack_arrays.stack, out_shardings=pack_step.stacked(shardings))
        return stack(self._widened())

    def make_step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        jitted = runtime.announce_first_call(
            pack_step.jit_train_step(self._pack), "first step"
        )
        return lambda states, batches: jitted(
            self._all_numbers, states, self._frozen, batches
        )

    def make_eval_step(self) -> Callable[[Any, Any, tuple[int, ...]], Sums]:
        jitted = pack_step.jit_eval_step(self._pack)
        return lambda states, batches, chosen: jitted(
            self._all_numbers, states.params, self._frozen, batches
        )

    def measured_by(self, number: int) -> list[int]:
        """Each run by itself: all are one product, so the others cost little."""
        return list(range(len(self._runs)))

    def keep(self, states: TrainState) -> TrainState:
        return train_step.keep_params(states)

    def part_of(self, row: int, arrays: Any) -> Any:
        return jax.tree.map(lambda x: x[row], arrays)

    def state_of(self, index: int, states: TrainState) -> TrainState:
        return pack_arrays.narrow(self.part_of(index, states), self._own[index])
