"""The step of several runs: the step of one run, mapped over states and batches.

The frozen base has no axis for the runs: under `vmap` each product with it is one
larger product. That pays where a product of one run leaves the device idle. A CPU is
busy with one, and `vmap` has a price: a loop whose trip count depends on the data
takes as many rounds as the longest of all, and selects in every round.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
      at_once: runs under one `vmap`; if there are more, they train in groups.
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


def jit_train_step(pack: PackDefinition) -> Callable[..., Any]:
    """`train_step.train_step` of all runs; all but `frozen` has a leading axis.

    Called as `(numbers, states, frozen, batches)`; the states are donated.
    """

    def train_all(
        numbers: RunNumbers, states: step.TrainState, frozen: Params, batches: Batch
    ) -> tuple[step.TrainState, step.Metrics]:
        def one(numbers: RunNumbers, state: step.TrainState, batch: Batch) -> Any:
            return step.train_step(bind(pack, numbers), state, frozen, batch)

        return _over_runs(pack, one, numbers, states, batches)

    everywhere, states, frozen = _shardings(pack)
    batches = batch_shardings(pack, microbatched=True)
    return jax.jit(
        train_all,
        in_shardings=(everywhere, states, frozen, batches),
        out_shardings=(states, everywhere),
        donate_argnums=1,
    )


def jit_eval_step(pack: PackDefinition) -> Callable[..., Sums]:
    """`train_step.eval_step` of the chosen runs alone, in that order.

    Called as `(numbers, params, frozen, batches, chosen)`.
    """

    def evaluate_chosen(
        numbers: RunNumbers,
        params: Params,
        frozen: Params,
        batches: Batch,
        chosen: tuple[int, ...],
    ) -> Sums:
        def one(numbers: RunNumbers, params: Params, batch: Batch) -> Sums:
            return step.eval_step(bind(pack, numbers), params, frozen, batch)

        stacked = (numbers, params, batches)
        if len(chosen) < numbers.seed.size:
            stacked = jax.tree.map(lambda x: jnp.stack([x[i] for i in chosen]), stacked)
        return _over_runs(pack, one, *stacked)

    everywhere, states, frozen = _shardings(pack)
    batches = batch_shardings(pack, microbatched=False)
    return jax.jit(
        evaluate_chosen,
        in_shardings=(everywhere, states.params, frozen, batches),
        out_shardings=everywhere,
        static_argnums=4,
    )


def _over_runs(pack: PackDefinition, one: Callable[..., Any], *stacked: Any) -> Any:
    """`one` for each run, `pack.at_once` of them in one product."""
    runs = len(jax.tree.leaves(stacked)[0])
    if pack.at_once == 1:  # Not a batch of one, which would be under `vmap`.
        return jax.lax.map(lambda run: one(*run), stacked)
    if pack.at_once >= runs:
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
    """Shardings for what all devices hold, the stacked states, the frozen base."""
    definition = pack.definition
    return (
        meshes.replicated(definition.mesh),
        stacked(step.state_shardings(definition)),
        meshes.shardings(definition.trainable.frozen_specs, definition.mesh),
    )
