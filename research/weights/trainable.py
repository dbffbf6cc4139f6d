"""What is trained, what is frozen, and the parameters the model then sees.

The one place that knows whether a run is LoRA or full fine-tuning.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.config.run_config import Config
from research.weights.adapters import lora
from research.weights.parameter_spec import Spec

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A run's split of the parameters.

    Attributes:
      specs: of what is trained, a (nested) dictionary of `Spec`.
      frozen_specs: of what is not.
      frozen_dtype: dtype the frozen parameters are kept in.
      dtype: of what is trained, and of its moments.
      init: `(key, base) -> params`, the start of what is trained.
      forward: `(params, frozen, key) -> model parameters`; `key` switches LoRA
        dropout on and is None in evaluation.
    """

    specs: dict[str, Any]
    frozen_specs: Mapping[str, Spec]
    frozen_dtype: Any
    dtype: Any
    init: Callable[[Array, Params], Params]
    forward: Callable[[Params, Params, Array | None], Params]


def make(config: Config, specs: Mapping[str, Spec]) -> Trainable:
    """Decides by `config.trainable`, for a model with parameters `specs`.

    Raises:
      UserError: LoRA targets that match nothing, or a rank below 1.
    """
    if config.trainable == "lora":
        return Trainable(
            specs=lora.adapter_specs(specs, config.lora),
            frozen_specs=specs,
            frozen_dtype=jnp.dtype(config.model.dtype),
            dtype=jnp.dtype(jnp.float32),
            init=lambda key, base: lora.init(key, specs, config.lora),
            forward=lambda params, frozen, key: lora.adapt(
                frozen, params, config.lora, key
            ),
        )
    return Trainable(
        specs=dict(specs),
        frozen_specs={},
        frozen_dtype=jnp.dtype(config.model.dtype),
        dtype=jnp.dtype(config.model.param_dtype),
        init=lambda key, base: base,
        forward=lambda params, frozen, key: params,
    )
