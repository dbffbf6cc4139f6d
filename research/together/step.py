"""The step of several runs: that of one run, under `vmap` over all that differs.

The frozen base has no axis for the runs: each product with it is one larger product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from research import lora, optim, step, trainable
from research import mesh as meshes
from research.batch import Batch
from research.config import Config
from research.together.members import Factors, Member

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that train together.

    Attributes:
      config: what all of them share; the rest of it is not used.
      job: of one run, over the adapters of all.
      dropout: whether any run has some; without, no random bits are drawn.
    """

    config: Config
    job: step.Job
    dropout: bool


def make_group(config: Config, job: step.Job, factors: Factors, dropout: bool) -> Group:
    """`job` may be that of any of the runs."""
    wide = dataclasses.replace(job.trainable, specs=factors)
    optimizer = optim.make_optimizer(config.optim, config.steps, factors)
    return Group(
        config, dataclasses.replace(job, trainable=wide, optimizer=optimizer), dropout
    )


def bind(group: Group, member: Member) -> step.Job:
    """The job of one run; its numbers may be traced."""
    split: trainable.Trainable = group.job.trainable
    config = group.config

    def forward(params: Params, frozen: Params, key: Array | None) -> Params:
        key = key if group.dropout else None
        return lora.attach(frozen, params, member.settings, key)

    return dataclasses.replace(
        group.job,
        trainable=dataclasses.replace(split, forward=forward),
        optimizer=optim.make_optimizer(
            config.optim, config.steps, split.specs, lambda n: member.rates[n - 1]
        ),
        seed=member.seed,
    )


def train_step(
    group: Group,
    members: Member,
    states: step.TrainState,
    frozen: Params,
    batches: Batch,
) -> tuple[step.TrainState, step.Metrics]:
    """As `research.step.train_step`, of all runs: everything has a leading axis."""

    def one(member: Member, state: step.TrainState, batch: Batch) -> Any:
        return step.train_step(bind(group, member), state, frozen, batch)

    return jax.vmap(one)(members, states, batches)


def eval_step(
    group: Group, members: Member, params: Params, frozen: Params, batches: Batch
) -> step.Metrics:
    def one(member: Member, params: Params, batch: Batch) -> step.Metrics:
        return step.eval_step(bind(group, member), params, frozen, batch)

    return jax.vmap(one)(members, params, batches)


def stacked(shardings: Any) -> Any:
    """The same with a leading axis that every device has whole."""
    return jax.tree.map(
        lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings
    )


def batch_shardings(group: Group, *, microbatched: bool) -> Any:
    return stacked(meshes.batch_sharding(group.job.mesh, microbatched=microbatched))


def jit_train_step(group: Group) -> Callable[..., Any]:
    """Called as `(members, states, frozen, batches)`; the states are donated."""
    states = stacked(step.state_shardings(group.job))
    everywhere = meshes.replicated(group.job.mesh)
    frozen = meshes.shardings(group.job.trainable.frozen_specs, group.job.mesh)
    return jax.jit(
        lambda *arguments: train_step(group, *arguments),
        in_shardings=(
            everywhere, states, frozen, batch_shardings(group, microbatched=True),
        ),
        out_shardings=(states, everywhere),
        donate_argnums=1,
    )  # fmt: skip


def jit_eval_step(group: Group) -> Callable[..., step.Metrics]:
    """Called as `(members, params, frozen, batches)`."""
    states = stacked(step.state_shardings(group.job))
    everywhere = meshes.replicated(group.job.mesh)
    frozen = meshes.shardings(group.job.trainable.frozen_specs, group.job.mesh)
    return jax.jit(
        lambda *arguments: eval_step(group, *arguments),
        in_shardings=(
            everywhere, states.params, frozen,
            batch_shardings(group, microbatched=False),
        ),
        out_shardings=everywhere,
    )  # fmt: skip
