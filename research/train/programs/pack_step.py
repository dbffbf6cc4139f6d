"""The step of several runs: one program for any of them, or one for all of them.

The first is called for each run. In the second the step is mapped over states and
batches; the frozen base has no axis for the runs, so under `vmap` each product with it
is one larger product. That pays where a product of one run leaves the device idle. A
CPU is busy with one run, and would only hold the activations of all runs longer.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from research.config.run_config import Config
from research.data.metric_sums import Sums
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.train.programs.pack_arrays import Factors, RunNumbers
from research.train.step import optimizers
from research.train.step import train_step as step
from research.weights import trainable
from research.weights.adapters.adapter_kind import AdapterKind

Array = jax.Array
Params = dict[str, Any]

ALL = sys.maxsize


@dataclasses.dataclass(frozen=True)
class PackDefinition:
    """Runs that train together.

    Attributes:
      config: the config of any run; only what all of them share is used.
      definition: the step of one run, over the adapters of all.
      dropout: whether any run uses dropout; if not, no random bits are drawn.
      at_once: runs under one `vmap`; if there are more, they train in groups. With 1
        each run has its own calls of one program.
    """

    config: Config
    definition: step.StepDefinition
    dropout: bool
    at_once: int


def make_pack_definition(
    config: Config,
    definition: step.StepDefinition,
    kind: AdapterKind,
    factors: Factors,
    dropout: bool,
    at_once: int,
) -> PackDefinition:
    """`definition` is that of any run; `at_once` 0 chooses what suits its device."""
    if not at_once:
        is_cpu = definition.mesh.devices.flat[0].platform == "cpu"
        at_once = 1 if is_cpu else ALL
    wide = dataclasses.replace(definition.trainable, specs=factors, kind=kind)
    # Its state alone is used here; factors of the rate have none.
    optimizer = optimizers.make_optimizer(
        config.optim, config.steps, factors, factors={}
    )
    return PackDefinition(
        config=config,
        definition=dataclasses.replace(definition, trainable=wide, optimizer=optimizer),
        dropout=dropout,
        at_once=at_once,
    )


def bind(pack: PackDefinition, numbers: RunNumbers) -> step.StepDefinition:
    """The step definition of one run; its numbers may be traced."""
    split: trainable.Trainable = pack.definition.trainable
    config = pack.config

    def forward(params: Params, frozen: Params, key: Array | None) -> Params:
        key = key if pack.dropout else None
        return split.kind.attach(frozen, params, numbers.settings, key)

    def measure(params: Params, frozen: Params) -> Params:
        return split.kind.measure(frozen, params, numbers.settings)

    return dataclasses.replace(
        pack.definition,
        trainable=dataclasses.replace(split, forward=forward, measure=measure),
        optimizer=optimizers.make_optimizer(
            config.optim,
            config.steps,
            split.specs,
            lambda n: numbers.rates[n - 1],
            numbers.factors,
        ),
        seed=numbers.seed,
    )


def jit_run_step(pack: PackDefinition) -> Callable[..., Any]:
    """`train_step.train_step` of one run of the pack, whichever it is.

    Called as `(numbers, state, frozen, batch)`; the state is donated.
    """
    everywhere, state, frozen = _shardings(pack)
    batch = meshes.batch_sharding(pack.definition.mesh, microbatched=True)
    return jax.jit(
        functools.partial(_train_run, pack),
        in_shardings=(everywhere, state, frozen, batch),
        out_shardings=(state, everywhere),
        donate_argnums=1,
    )


def jit_run_eval_step(pack: PackDefinition) -> Callable[..., Sums]:
    """`train_step.eval_step` of one run: `(numbers, params, frozen, batch)`."""
    everywhere, state, frozen = _shardings(pack)
    batch = meshes.batch_sharding(pack.definition.mesh)
    return jax.jit(
        functools.partial(_evaluate_run, pack),
        in_shardings=(everywhere, state.params, frozen, batch),
        out_shardings=everywhere,
    )


def jit_train_step(pack: PackDefinition) -> Callable[..., Any]:
    """`jit_run_step` of all runs; all but `frozen` has a leading axis.

    Called as `(numbers, states, frozen, batches)`; the states are donated.
    """

    def train_all(
        numbers: RunNumbers, states: step.TrainState, frozen: Params, batches: Batch
    ) -> tuple[step.TrainState, step.Metrics]:
        def one(numbers: RunNumbers, state: step.TrainState, batch: Batch) -> Any:
            return _train_run(pack, numbers, state, frozen, batch)

        return _over_runs(pack, one, numbers, states, batches)

    everywhere, state, frozen = _shardings(pack)
    states = stacked(state)
    batches = batch_shardings(pack, microbatched=True)
    return jax.jit(
        train_all,
        in_shardings=(everywhere, states, frozen, batches),
        out_shardings=(states, everywhere),
        donate_argnums=1,
    )


def jit_eval_step(pack: PackDefinition) -> Callable[..., Sums]:
    """`jit_run_eval_step` of all runs: `(numbers, params, frozen, batches)`."""

    def evaluate_all(
        numbers: RunNumbers, params: Params, frozen: Params, batches: Batch
    ) -> Sums:
        def one(numbers: RunNumbers, params: Params, batch: Batch) -> Sums:
            return _evaluate_run(pack, numbers, params, frozen, batch)

        return _over_runs(pack, one, numbers, params, batches)

    everywhere, state, frozen = _shardings(pack)
    batches = batch_shardings(pack, microbatched=False)
    return jax.jit(
        evaluate_all,
        in_shardings=(everywhere, stacked(state.params), frozen, batches),
        out_shardings=everywhere,
    )


def _train_run(
    pack: PackDefinition,
    numbers: RunNumbers,
    state: step.TrainState,
    frozen: Params,
    batch: Batch,
) -> tuple[step.TrainState, step.Metrics]:
    return step.train_step(bind(pack, numbers), state, frozen, batch)


def _evaluate_run(
    pack: PackDefinition,
    numbers: RunNumbers,
    params: Params,
    frozen: Params,
    batch: Batch,
) -> Sums:
    return step.eval_step(bind(pack, numbers), params, frozen, batch)


def _over_runs(pack: PackDefinition, one: Callable[..., Any], *stacked: Any) -> Any:
    """`one` for each run, `pack.at_once` of them in one product."""
    if pack.at_once >= len(jax.tree.leaves(stacked)[0]):
        return jax.vmap(one)(*stacked)
    return jax.lax.map(lambda run: one(*run), stacked, batch_size=pack.at_once)


def stacked(shardings: Any) -> Any:
    """The same shardings with a leading axis that is not split."""
    return jax.tree.map(
        lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings
    )


def batch_shardings(pack: PackDefinition, *, microbatched: bool) -> Any:
    """Shardings of a batch of the pack: `[runs, rows, seq]`, or microbatched."""
    return stacked(
        meshes.batch_sharding(pack.definition.mesh, microbatched=microbatched)
    )


def _shardings(pack: PackDefinition) -> tuple[Any, step.TrainState, Params]:
    """Shardings for what all devices hold, the state of a run, the frozen base."""
    definition = pack.definition
    return (
        meshes.replicated(definition.mesh),
        step.state_shardings(definition),
        meshes.shardings(definition.trainable.frozen_specs, definition.mesh),
    )
