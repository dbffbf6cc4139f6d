"""The step of several runs: that of one run, mapped over all that differs.

The frozen base has no axis for the runs: where they are mapped by `vmap`, each product
with it is one larger product. That pays where a product of one run leaves the device
idle. A CPU is busy with one, and `vmap` has a price: a loop whose trip count depends on
the data runs to the longest of all, and selects in every round.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from research.config.run_config import Config
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.train.programs.pack_arrays import Factors, RunNumbers
from research.train.step import optimizers
from research.train.step import train_step as step
from research.weights import trainable

Array = jax.Array
Params = dict[str, Any]

ALL = sys.maxsize


@dataclasses.dataclass(frozen=True)
class PackDefinition:
    """Runs that train together.

    Attributes:
      config: what all of them share; the rest of it is not used.
      definition: of one run, over the adapters of all.
      dropout: whether any run has some; without, no random bits are drawn.
      at_once: runs under one `vmap`; these parts go one after another.
    """

    config: Config
    definition: step.StepDefinition
    dropout: bool
    at_once: int


def make_group(
    config: Config,
    definition: step.StepDefinition,
    factors: Factors,
    dropout: bool,
    at_once: int,
) -> PackDefinition:
    """`definition` is that of any run; `at_once` 0 takes what suits its device."""
    if not at_once:
        is_cpu = definition.mesh.devices.flat[0].platform == "cpu"
        at_once = 1 if is_cpu else ALL
    wide = dataclasses.replace(definition.trainable, specs=factors)
    optimizer = optimizers.make_optimizer(config.optim, config.steps, factors)
    return PackDefinition(
        config=config,
        definition=dataclasses.replace(definition, trainable=wide, optimizer=optimizer),
        dropout=dropout,
        at_once=at_once,
    )


def bind(group: PackDefinition, member: RunNumbers) -> step.StepDefinition:
    """The step definition of one run; its numbers may be traced."""
    split: trainable.Trainable = group.definition.trainable
    config = group.config

    def forward(params: Params, frozen: Params, key: Array | None) -> Params:
        key = key if group.dropout else None
        return split.kind.attach(frozen, params, member.settings, key)

    return dataclasses.replace(
        group.definition,
        trainable=dataclasses.replace(split, forward=forward),
        optimizer=optimizers.make_optimizer(
            config.optim, config.steps, split.specs, lambda n: member.rates[n - 1]
        ),
        seed=member.seed,
    )


def train_step(
    group: PackDefinition,
    members: RunNumbers,
    states: step.TrainState,
    frozen: Params,
    batches: Batch,
) -> tuple[step.TrainState, step.Metrics]:
    """`train_step.train_step` of all runs: everything has a leading axis."""

    def one(member: RunNumbers, state: step.TrainState, batch: Batch) -> Any:
        return step.train_step(bind(group, member), state, frozen, batch)

    return _over_runs(group, one, members, states, batches)


def eval_step(
    group: PackDefinition,
    members: RunNumbers,
    params: Params,
    frozen: Params,
    batches: Batch,
    chosen: tuple[int, ...],
) -> step.Metrics:
    """`train_step.eval_step` of the chosen runs alone, in that order."""

    def one(member: RunNumbers, params: Params, batch: Batch) -> step.Metrics:
        return step.eval_step(bind(group, member), params, frozen, batch)

    stacked = (members, params, batches)
    if len(chosen) < members.seed.size:
        stacked = jax.tree.map(lambda x: jnp.stack([x[i] for i in chosen]), stacked)
    return _over_runs(group, one, *stacked)


def _over_runs(group: PackDefinition, one: Callable[..., Any], *stacked: Any) -> Any:
    """`one` for each run, as many at once as `group` says."""
    runs = len(jax.tree.leaves(stacked)[0])
    if group.at_once == 1:  # Not a batch of one, which would be under `vmap`.
        return jax.lax.map(lambda run: one(*run), stacked)
    if group.at_once >= runs:
        return jax.vmap(one)(*stacked)
    return jax.lax.map(lambda run: one(*run), stacked, batch_size=group.at_once)


def stacked(shardings: Any) -> Any:
    """The same with a leading axis that every device has whole."""
    return jax.tree.map(
        lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings
    )


def batch_shardings(group: PackDefinition, *, microbatched: bool) -> Any:
    return stacked(
        meshes.batch_sharding(group.definition.mesh, microbatched=microbatched)
    )


def jit_train_step(group: PackDefinition) -> Callable[..., Any]:
    """Called as `(members, states, frozen, batches)`; the states are donated."""
    states = stacked(step.state_shardings(group.definition))
    everywhere = meshes.replicated(group.definition.mesh)
    frozen = meshes.shardings(
        group.definition.trainable.frozen_specs, group.definition.mesh
    )
    return jax.jit(
        lambda *arguments: train_step(group, *arguments),
        in_shardings=(
            everywhere, states, frozen, batch_shardings(group, microbatched=True),
        ),
        out_shardings=(states, everywhere),
        donate_argnums=1,
    )  # fmt: skip


def jit_eval_step(group: PackDefinition) -> Callable[..., step.Metrics]:
    """Called as `(members, params, frozen, batches, chosen)`."""
    states = stacked(step.state_shardings(group.definition))
    everywhere = meshes.replicated(group.definition.mesh)
    frozen = meshes.shardings(
        group.definition.trainable.frozen_specs, group.definition.mesh
    )
    return jax.jit(
        lambda *arguments: eval_step(group, *arguments),
        in_shardings=(
            everywhere, states.params, frozen,
            batch_shardings(group, microbatched=False),
        ),
        out_shardings=everywhere,
        static_argnums=4,
    )  # fmt: skip
