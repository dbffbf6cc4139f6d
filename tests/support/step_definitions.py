"""Jobs of the tiny model on meshes of eight devices, for the tests of the step."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_sizes, random_adapters

from research.config.run_config import (
    Config,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)
from research.data.token_batch import Batch
from research.models.attention_sharding import make_attend
from research.models.parts.expert_dispatch import mix_experts
from research.models.parts.expert_sharding import make_mix_experts
from research.parallel import mesh as meshes
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.step import optimizers, train_step
from research.weights import trainable
from research.weights.parameter_spec import Spec

ONE = (1, 1, 1)
# A large eps: Adam turns rounding in a gradient near zero into a full-size update.
OPTIM = OptimConfig(learning_rate=1e-2, eps=1e-2, clip_norm=1.0)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=(".",))


def make_definition(model, kind, sizes, dtype="float32"):
    """A definition, and how often its forward pass was traced so far."""
    config = Config(
        trainable=kind, model=ModelConfig(dtype=dtype), lora=LORA, optim=OPTIM
    )
    mesh = meshes.make_mesh(mesh_sizes(*sizes), jax.devices()[: math.prod(sizes)])
    made = trainable.make(config.trainable, config.model, config.lora, model.specs)
    traced = []

    def forward(*arguments):
        traced.append(1)
        return made.forward(*arguments)

    definition = train_step.StepDefinition(
        model=model.with_options(
            constrain=meshes.constrain(mesh),
            attend=make_attend(mesh, "xla", 7),
            mix_experts=make_mix_experts(mesh, mix_experts),
            dtype=jnp.dtype(dtype),
        ),
        trainable=dataclasses.replace(made, forward=forward),
        optimizer=optimizers.make_optimizer(OPTIM, 10, made.specs),
        mesh=mesh,
        objective=CrossEntropy(groups=4, chunk=5, shards=meshes.shards(mesh)),
    )
    return definition, traced


def spread(values, specs, mesh):
    """A copy on `mesh`, which a function that takes it over may delete."""
    # `device_put` shares what already lies in its place, whatever `may_alias` says.
    copies = jax.tree.map(jnp.copy, values)
    return jax.device_put(copies, meshes.shardings(specs, mesh))


class OneLogit:
    """A model whose one logit is `read(weights, ids)`, `[rows, seq]`: losses show it.

    The other one is 0, and the target of every token.
    """

    architecture = types.SimpleNamespace(vocab=2, embedding_scale=1.0)

    def __init__(self, read):
        self._read = read

    def hidden(self, weights, tokens, positions, segments):
        return self._read(weights, tokens)[..., None]

    def hidden_and_load(self, *packed):
        return self.hidden(*packed), None

    def head(self, weights):
        return weights

    def logits(self, weights, hidden):
        return jnp.concatenate([hidden, jnp.zeros_like(hidden)], axis=-1)

    def keys_seen(self, positions):
        return jnp.zeros(positions.shape)


class OneLogitStep:
    """The real step over `OneLogit`, in two microbatches; it compiles in no time.

    `forward` is that of `Trainable`, `changes` are fields of the step's definition.
    """

    def __init__(self, forward, read, **changes):
        made = trainable.Trainable(
            specs={"w": Spec((1,), ("norm",), n_in=0)}, frozen_specs={},
            frozen_dtype=None, dtype=None, init=None, forward=forward,
        )  # fmt: skip
        mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        objective = CrossEntropy(groups=1, chunk=4)
        self._definition = train_step.StepDefinition(
            OneLogit(read), made, optax.sgd(0.0), mesh, objective, **changes
        )
        self._train = jax.jit(
            functools.partial(train_step.train_step, self._definition)
        )
        self._params = {"w": jnp.ones(1)}

    def _batch(self, weights):
        zeros = np.zeros(weights.shape, np.int32)
        return Batch(zeros, zeros, weights, zeros + 1, zeros, zeros)

    def loss(self, steps, microbatch):
        """The loss of one microbatch in the step after `steps` updates."""
        weights = np.zeros((2, 1, 4), np.float32)
        weights[microbatch] = 1.0
        state = train_step.init_state(self._definition, self._params)
        state = dataclasses.replace(state, step=jnp.int32(steps))
        metrics = self._train(state, {}, self._batch(weights))[1]
        return float(metrics["means"]["loss"])

    def held_out(self):
        evaluate = functools.partial(train_step.eval_step, self._definition)
        batch = self._batch(np.ones((1, 4), np.float32))
        found = jax.jit(evaluate)(self._params, {}, batch)["loss"]
        return float(jnp.sum(found.numerator) / jnp.sum(found.denominator))


@pytest.fixture(scope="session")
def five_steps(model, params, batch):
    """`five_steps(kind, sizes, microbatches)`: and all one can ask about them.

    Compiling a step takes seconds, so each is made once and shared.
    """

    @functools.cache
    def run(kind, sizes, microbatches, offload):
        definition, traced = make_definition(model, kind, sizes)
        definition = dataclasses.replace(definition, offload=offload)
        lora = kind == "lora"
        frozen = spread(params, model.specs, definition.mesh) if lora else {}
        start = random_adapters(definition.trainable.specs) if lora else params
        first = train_step.jit_init(definition)(
            spread(start, definition.trainable.specs, definition.mesh)
        )
        state, train = first, train_step.jit_train_step(definition)
        on_mesh = meshes.to_global(batch, definition.mesh, microbatches)
        metrics, traces = [], []
        for _ in range(5):
            state, found = train(state, frozen, on_mesh)
            metrics.append(jax.tree.map(np.asarray, found))
            traces.append(len(traced))
        compiled = train._cache_size()
        return types.SimpleNamespace(
            definition=definition, frozen=frozen, first=first, state=state,
            metrics=metrics, traces=traces, compiled=compiled,
            lowered=train.lower(state, frozen, on_mesh),
        )  # fmt: skip

    return lambda kind, sizes=ONE, microbatches=1, offload=False: run(
        kind, sizes, microbatches, offload
    )
