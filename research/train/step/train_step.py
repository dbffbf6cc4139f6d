"""The train and evaluation step: pure functions, and the jit with their shardings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from research.data import metric_sums
from research.data.metric_sums import Objective, Sums
from research.data.token_batch import Batch
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.train.step import optimizers
from research.weights import parameter_paths
from research.weights.quantized.int8_weights import with_byte_products
from research.weights.representations.noisy_table import NoisyTable, noise_bounds
from research.weights.trainable import Trainable

Array = jax.Array
Params = dict[str, Any]
Metrics = dict[str, Any]

DROPOUT_STREAM = 2**31 - 1
NOISE_STREAM = 2**31 - 2
TABLE = "embedding.table"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The content of a checkpoint: saved, restored and donated as one.

    Attributes:
      step: int32, optimizer updates completed.
      params: what is trained.
      opt_state: of optax.
    """

    step: Array
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepDefinition:
    """Everything a step is made of. Holds no arrays.

    Attributes:
      model: with its compute options.
      trainable: the split into trained and frozen.
      optimizer: of optax.
      mesh: of devices.
      objective: what is differentiated and reported.
      seed: of dropout.
      offload: the optimizer's state lies in the host's memory between updates.
      grad_norms: the step also gives the gradient norm of each parameter.
      noise_alpha: size of the noise on embeddings in training (NEFTune); 0 for none.
      int8_products: training multiplies by the codes of a base in int8; evaluation
        does not.
    """

    model: Model
    trainable: Trainable
    optimizer: optax.GradientTransformation
    mesh: Mesh
    objective: Objective
    seed: int = 0
    offload: bool = False
    grad_norms: bool = False
    noise_alpha: float = 0.0
    int8_products: bool = False


def _sum_microbatches(
    definition: StepDefinition, state: TrainState, frozen: Params, batch: Batch
) -> tuple[Params, Sums]:
    """The gradient, in float32, and the named sums, of all microbatches, undivided."""
    metric_sums.require_units(definition.objective, batch)
    # A random stream apart from that of the initialisation, which folds in small
    # numbers, too.
    dropout = jax.random.fold_in(jax.random.key(definition.seed), DROPOUT_STREAM)
    key = jax.random.fold_in(dropout, state.step)
    frozen = definition.trainable.measure(state.params, frozen)

    def accumulate(total, microbatch_and_key):
        microbatch, key = microbatch_and_key

        def objective(params):
            weights = definition.trainable.forward(params, frozen, key)
            if definition.int8_products:
                weights = with_byte_products(weights)
            if definition.noise_alpha:
                weights = _with_noise(definition, weights, microbatch, key)
            return definition.objective.train(definition.model, weights, microbatch)

        (_, sums), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
        return jax.tree.map(jnp.add, total, gradient), sums

    # In float32 for bfloat16 parameters, too, which would round small terms away.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
    keys = jax.random.split(key, batch.tokens.shape[0])
    gradients, sums = jax.lax.scan(accumulate, zeros, (batch, keys))
    # Without the barrier the compiler may merge the sums over microbatches and over
    # groups into one reduction, and then it chooses the order of the additions.
    sums = jax.lax.optimization_barrier(
        jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    )
    return gradients, sums


def _with_noise(
    definition: StepDefinition, weights: Params, batch: Batch, key: Array
) -> Params:
    """`weights` whose embeddings of `batch` `[rows, seq]` are noisy."""
    table, family = weights[TABLE], definition.model.architecture
    # Gemma multiplies its embeddings, and its noise is that of the products.
    alpha = definition.noise_alpha / family.embedding_scale
    bound = noise_bounds(batch.segments, alpha, table.shape[-1])
    own = jax.random.fold_in(key, NOISE_STREAM)
    return weights | {TABLE: NoisyTable(table, own, bound)}


def train_step(
    definition: StepDefinition, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimizer update from a `[microbatch, batch, seq]` batch.

    The objective's sums and the gradient are added up over microbatches and devices
    and divided once, so none of them depends on how the batch was split.

    Returns:
      The next state, and `sums` (those of the objective), `means` (each of them
      divided, over all groups), `weight` (trained tokens), `tokens` (real tokens),
      `pairs` (queries with each key they may see, as a mean over layers),
      `grad_norm` (before clipping),
      `param_norm` (of the next state, finite only if all its parameters are),
      `batch_hash` (of what was trained on, the same on every mesh),
      `skipped` (updates skipped so far, where `optim.skip_outliers` is in use),
      `grad_norm_by_path` (where `definition.grad_norms` is set).
    """
    gradients, sums = _sum_microbatches(definition, state, frozen, batch)
    means = {name: metric_sums.mean(ratio) for name, ratio in sums.items()}
    scale = metric_sums.inverse(jnp.sum(sums["loss"].denominator))
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    optimizer = optax.with_extra_args_support(definition.optimizer)
    before = state.opt_state
    if definition.offload:
        before = jax.device_put(before, jax.memory.Space.Device)
    updates, opt_state = optimizer.update(
        gradients, before, state.params, loss=means["loss"]
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "sums": sums,
        "means": means,
        "weight": jnp.sum(batch.weights),
        "tokens": jnp.sum(batch.segments != 0),
        "pairs": jnp.sum(
            definition.model.keys_seen(batch.positions) * (batch.segments != 0)
        ),
        **_gradient_norms(definition, gradients),
        "param_norm": _norm_in_float32(params),
        "batch_hash": hash_batch(batch),
        **optimizers.read_skipped(opt_state),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def _gradient_norms(definition: StepDefinition, gradients: Params) -> dict[str, Any]:
    norms: dict[str, Any] = {"grad_norm": optax.tree.norm(gradients)}
    if definition.grad_norms:
        by_path = parameter_paths.flatten(gradients)[0]
        norms["grad_norm_by_path"] = {p: optax.tree.norm(g) for p, g in by_path.items()}
    return norms


def _norm_in_float32(params: Params) -> Array:
    """A norm above the square root of float32's largest number counts as infinite."""
    return optax.tree.norm(jax.tree.map(lambda p: p.astype(jnp.float32), params))


def hash_batch(batch: Batch) -> Array:
    """uint32 that another id, order, target or weight almost surely changes.

    A sum of products modulo 2**32 (multilinear hashing: Lemire and Kaser 2014,
    arXiv:1202.4961), which no split over devices can reorder.
    """
    total = jnp.zeros((), jnp.uint32)
    for salt, field in enumerate((batch.tokens, batch.targets, batch.segments), 1):
        place = jax.lax.iota(jnp.uint32, field.size).reshape(field.shape)
        factor = (place * jnp.uint32(2654435761) + jnp.uint32(salt)) | jnp.uint32(1)
        total += jnp.sum((field.astype(jnp.uint32) + 1) * factor, dtype=jnp.uint32)
    bits = jax.lax.bitcast_convert_type(batch.weights, jnp.uint32)
    # Round numbers end in zeros, which a product modulo 2**32 would lose.
    return total + jnp.sum((bits ^ (bits >> 16)) * factor, dtype=jnp.uint32)


def eval_step(
    definition: StepDefinition, params: Params, frozen: Params, batch: Batch
) -> Sums:
    """The objective's sums over one `[batch, seq]` batch of held-out rows."""
    weights = definition.trainable.forward(params, frozen, None)
    objective, model = definition.objective, definition.model
    return metric_sums.evaluate_weights(objective, model, weights, batch)


def init_state(definition: StepDefinition, params: Params) -> TrainState:
    """The state before the first update."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, definition.optimizer.init(params)
    )


def keep_params(states: Any) -> Any:
    """A copy of the step and the trained parameters alone, which no step donates.

    `states` is a tree of `TrainState`s, such as one of them.
    """
    states = jax.tree.map(
        lambda state: TrainState(state.step, state.params, None),
        states,
        is_leaf=lambda x: isinstance(x, TrainState),
    )
    where = jax.tree.map(lambda x: x.sharding, states)
    return jax.jit(lambda kept: jax.tree.map(jnp.copy, kept), out_shardings=where)(
        states
    )


def abstract_params(definition: StepDefinition) -> Params:
    """Shapes of what is trained, each with its sharding."""
    trainable = definition.trainable
    return meshes.abstract_arrays(trainable.specs, definition.mesh, trainable.dtype)


def state_shardings(definition: StepDefinition) -> TrainState:
    """Optimizer leaves lie as the parameters they belong to, others on every device.

    Whatever the optimizer, a leaf's path ends in the path of its parameter.
    """
    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(definition))
    everywhere = meshes.replicated(definition.mesh)
    specs, _ = parameter_paths.flatten(definition.trainable.specs)

    def place(path: Any, leaf: Any) -> Any:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        names = [".".join(keys[i:]) for i in range(len(keys))]
        spec = next((specs[name] for name in names if name in specs), None)
        if spec is None:
            return everywhere
        sharding = meshes.reduced_sharding(leaf.shape, spec, definition.mesh)
        return meshes.on_host(sharding) if definition.offload else sharding

    abstract = jax.eval_shape(
        lambda p: init_state(definition, p), abstract_params(definition)
    )
    opt_state = jax.tree_util.tree_map_with_path(place, abstract.opt_state)
    return TrainState(everywhere, params, opt_state)


def abstract_state(definition: StepDefinition) -> TrainState:
    """Shapes and shardings of the whole state: the target of a restore."""
    abstract = jax.eval_shape(
        lambda p: init_state(definition, p), abstract_params(definition)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        state_shardings(definition),
    )


def jit_init(definition: StepDefinition) -> Callable[[Params], TrainState]:
    """`init_state`, compiled: makes the sharded state of step 0 from parameters.

    The parameters are donated: the state takes their place in memory.
    """
    return jax.jit(
        lambda params: init_state(definition, params),
        out_shardings=state_shardings(definition),
        donate_argnums=0,
    )


def jit_train_step(
    definition: StepDefinition,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """`train_step`, compiled: shardings are explicit, and the state is donated."""
    state = state_shardings(definition)
    frozen = meshes.shardings(definition.trainable.frozen_specs, definition.mesh)
    batch = meshes.batch_sharding(definition.mesh, microbatched=True)
    return jax.jit(
        lambda state, frozen, batch: train_step(definition, state, frozen, batch),
        in_shardings=(state, frozen, batch),
        out_shardings=(state, meshes.replicated(definition.mesh)),
        donate_argnums=0,
    )


def jit_eval_step(
    definition: StepDefinition,
) -> Callable[[Params, Params, Batch], Sums]:
    """`eval_step`, compiled: the sums of one batch `[rows, seq]` on every device."""
    state = state_shardings(definition)
    frozen = meshes.shardings(definition.trainable.frozen_specs, definition.mesh)
    return jax.jit(
        lambda params, frozen, batch: eval_step(definition, params, frozen, batch),
        in_shardings=(state.params, frozen, meshes.batch_sharding(definition.mesh)),
        out_shardings=meshes.replicated(definition.mesh),
    )
