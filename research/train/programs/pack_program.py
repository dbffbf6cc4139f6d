"""The program of several LoRA runs at one step: padded adapters, stacked state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from research.data.metric_sums import Sums
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.tasks import task_registry
from research.train.programs import pack_arrays, pack_step
from research.train.programs.device_batches import place_batch
from research.train.step import train_step
from research.train.training_run import TrainingRun


class PackProgram:
    """The program of several runs; `SingleRunProgram` says what each method does."""

    def __init__(self, runs: Sequence[TrainingRun], at_once: int = 0):
        """`at_once`: runs under one `vmap`; 0 chooses what suits the device."""
        self._runs = runs
        first, definition = runs[0], runs[0].definition
        configs = [run.config for run in runs]
        self._frozen = first.frozen
        specs = definition.model.specs
        kind, factors = pack_arrays.union(specs, configs)
        # Wide enough for the run with the most groups; those of others stay empty.
        objective = task_registry.make_objective(
            first.config, definition.mesh, max(len(run.task.groups) for run in runs)
        )
        self._pack = pack_step.make_pack_definition(
            first.config,
            dataclasses.replace(definition, objective=objective),
            kind,
            factors,
            any(config.lora.dropout > 0 for config in configs),
            at_once,
        )
        self._own = [train_step.abstract_state(run.definition) for run in runs]
        has_factors = any(config.optim.rate_pattern for config in configs)
        numbers = [
            pack_arrays.run_numbers(c, specs, factors, has_factors) for c in configs
        ]
        everywhere = meshes.replicated(definition.mesh)
        self._numbers = jax.device_put(pack_arrays.stack(numbers), everywhere)
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

    def initial_state(self) -> train_step.TrainState:
        definition = self._pack.definition
        wide = train_step.abstract_state(definition)
        shardings = pack_step.stacked(train_step.state_shardings(definition))
        kind = definition.trainable.kind
        states = [pack_arrays.widen(run.state, wide, kind) for run in self._runs]
        return jax.device_put(pack_arrays.stack(states), shardings)

    def make_step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        jitted = pack_step.jit_train_step(self._pack)
        return lambda state, batch: jitted(self._numbers, state, self._frozen, batch)

    def make_eval_step(self) -> Callable[[Any, Any, tuple[int, ...]], Sums]:
        jitted = pack_step.jit_eval_step(self._pack)
        return lambda state, batch, chosen: jitted(
            self._numbers, state.params, self._frozen, batch, chosen
        )

    def measured_by(self, number: int) -> list[int]:
        """Before the first step, the first run with the same rows measures for a run.

        Adapters are an exact no-op then, as the doctor has checked, so all runs are the
        base model. Where all runs are one product, each is measured by itself: the
        others cost little, and no second program is compiled.
        """
        every = list(range(len(self._runs)))
        if number or self._pack.at_once > 1:
            return every
        tasks = [id(run.task) for run in self._runs]
        return [tasks.index(task) for task in tasks]

    def part_of(self, row: int, arrays: Any) -> Any:
        return jax.tree.map(lambda x: x[row], arrays)

    def state_of(
        self, index: int, state: train_step.TrainState
    ) -> train_step.TrainState:
        return pack_arrays.narrow(state, index, self._own[index])
