"""The train and evaluation step: pure functions, and the jit with their shardings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from research import loss as losses
from research import mesh as meshes
from research.batch import Batch
from research.matrix import Spec
from research.models.transformer import Model
from research.trainable import Trainable

Array = jax.Array
Params = dict[str, Any]
Metrics = dict[str, Array]

DROPOUT_STREAM = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: saved, restored and donated as one.

    Attributes:
      step: int32, optimizer updates completed.
      params: what is trained, float32.
      opt_state: of optax.
    """

    step: Array
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything a step is made of. Holds no arrays.

    Attributes:
      model: with its compute options.
      trainable: the split into trained and frozen.
      optimizer: of optax.
      mesh: of devices.
      loss_chunk: positions per product with the vocabulary head.
      seed: of dropout.
    """

    model: Model
    trainable: Trainable
    optimizer: optax.GradientTransformation
    mesh: Mesh
    loss_chunk: int
    seed: int = 0


def loss_sum(
    job: Job, params: Params, frozen: Params, batch: Batch, key: Array | None
) -> Array:
    """Weighted sum of the cross entropies of one microbatch, in nats."""
    weights = job.trainable.forward(params, frozen, key)
    hidden = job.model.hidden(weights, batch.tokens, batch.positions, batch.segments)
    return losses.weighted_loss(
        hidden,
        job.model.head(weights),
        batch.targets,
        batch.weights,
        chunk=job.loss_chunk,
        shards=meshes.batch_shards(job.mesh),
    )


def train_step(
    job: Job, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimizer update from a `[microbatch, batch, seq]` batch.

    Loss and gradient are summed over microbatches and devices and divided once by
    the sum of all weights, so neither depends on how the batch was split.

    Returns:
      The next state, and `loss` (nats per trained token), `weight` (trained tokens),
      `tokens` (real tokens), `pairs` (queries with each key they may see),
      `grad_norm` (before clipping).
    """
    # Another stream than the initialisation, which folds small numbers in, too.
    dropout = jax.random.fold_in(jax.random.key(job.seed), DROPOUT_STREAM)
    key = jax.random.fold_in(dropout, state.step)

    def accumulate(carry, microbatch_and_key):
        microbatch, key = microbatch_and_key
        value, gradient = jax.value_and_grad(
            lambda params: loss_sum(job, params, frozen, microbatch, key)
        )(state.params)
        total, gradients = carry
        return (total + value, jax.tree.map(jnp.add, gradients, gradient)), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    keys = jax.random.split(key, batch.tokens.shape[0])
    (total, gradients), _ = jax.lax.scan(
        accumulate, (jnp.zeros((), jnp.float32), zeros), (batch, keys)
    )
    weight = jnp.sum(batch.weights)
    scale = 1.0 / jnp.maximum(weight, 1.0)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    updates, opt_state = job.optimizer.update(gradients, state.opt_state, state.params)
    metrics = {
        "loss": total * scale,
        "weight": weight,
        "tokens": jnp.sum(batch.segments != 0),
        "pairs": jnp.sum((batch.positions + 1.0) * (batch.segments != 0)),
        "grad_norm": optax.tree.norm(gradients),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(
    job: Job, groups: int, params: Params, frozen: Params, batch: Batch
) -> Metrics:
    """Sums per group over one `[batch, seq]` batch: `loss` and `weight`, `[groups]`."""
    weights = job.trainable.forward(params, frozen, None)
    hidden = job.model.hidden(weights, batch.tokens, batch.positions, batch.segments)
    token_losses = losses.chunked_token_losses(
        hidden,
        job.model.head(weights),
        batch.targets,
        batch.weights,
        chunk=job.loss_chunk,
        shards=meshes.batch_shards(job.mesh),
    )
    member = jax.nn.one_hot(batch.groups, groups, axis=0)
    return {
        "loss": jnp.sum(member * (token_losses * batch.weights)[None], axis=(1, 2)),
        "weight": jnp.sum(member * batch.weights[None], axis=(1, 2)),
    }


def init_state(job: Job, params: Params) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, job.optimizer.init(params))


def abstract_params(job: Job) -> Params:
    """Shapes of what is trained, each with its sharding."""
    shardings = meshes.shardings(job.trainable.specs, job.mesh)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(
            spec.shape, jnp.float32, sharding=sharding
        ),
        job.trainable.specs,
        shardings,
        is_leaf=lambda leaf: isinstance(leaf, Spec),
    )


def state_shardings(job: Job) -> TrainState:
    """Optimizer leaves lie as the parameters they belong to, others on every device."""
    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(job))
    everywhere = meshes.replicated(job.mesh)
    abstract = jax.eval_shape(lambda p: init_state(job, p), abstract_params(job))
    opt_state = optax.tree_utils.tree_map_params(
        job.optimizer,
        lambda _, sharding: sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state)


def abstract_state(job: Job) -> TrainState:
    """Shapes and shardings of the whole state: the target of a restore."""
    abstract = jax.eval_shape(lambda p: init_state(job, p), abstract_params(job))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        state_shardings(job),
    )


def jit_init(job: Job) -> Callable[[Params], TrainState]:
    return jax.jit(
        lambda params: init_state(job, params), out_shardings=state_shardings(job)
    )


def jit_train_step(
    job: Job,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The one jit of training: explicit shardings, donated state, frozen kept."""
    state = state_shardings(job)
    frozen = meshes.shardings(job.trainable.frozen_specs, job.mesh)
    batch = meshes.batch_sharding(job.mesh, microbatched=True)
    return jax.jit(
        lambda state, frozen, batch: train_step(job, state, frozen, batch),
        in_shardings=(state, frozen, batch),
        out_shardings=(state, meshes.replicated(job.mesh)),
        donate_argnums=0,
    )


def jit_eval_step(job: Job, groups: int) -> Callable[[Params, Params, Batch], Metrics]:
    state = state_shardings(job)
    frozen = meshes.shardings(job.trainable.frozen_specs, job.mesh)
    return jax.jit(
        lambda params, frozen, batch: eval_step(job, groups, params, frozen, batch),
        in_shardings=(state.params, frozen, meshes.batch_sharding(job.mesh)),
        out_shardings=meshes.replicated(job.mesh),
    )
