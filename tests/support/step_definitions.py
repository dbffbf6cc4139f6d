"""Jobs of the tiny model on meshes of eight devices, for the tests of the step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from helpers import mesh_sizes

from research.config.run_config import Config, LoRAConfig, ModelConfig, OptimConfig
from research.models.attention_sharding import make_attend
from research.parallel import mesh as meshes
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.step import optimizers, train_step
from research.weights import trainable

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
            dtype=jnp.dtype(dtype),
        ),
        trainable=dataclasses.replace(made, forward=forward),
        optimizer=optimizers.make_optimizer(OPTIM, 10, made.specs),
        mesh=mesh,
        objective=CrossEntropy(groups=4, chunk=5, shards=meshes.shards(mesh)),
    )
    return definition, traced


def spread(values, specs, mesh):
    return jax.device_put(values, meshes.shardings(specs, mesh))
