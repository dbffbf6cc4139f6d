"""LoRA with A from a normal distribution: PEFT's `init_lora_weights="gaussian"`."""

import jax
import jax.numpy as jnp

from research.weights.adapters.lora import LoRA
from research.weights.parameter_spec import Spec


class GaussianLoRA(LoRA):
    """A has a standard deviation of 1 / rank."""

    name = "gaussian"

    def draw(self, key: jax.Array, shape: tuple[int, ...], a: Spec) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32) / a.shape[-1]


KIND = GaussianLoRA()
