"""The split of a run's parameters into trained and frozen ones.

This is the one place that knows whether a run trains adapters or the whole model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.config.run_config import Config
from research.weights.adapters.adapter_kind import AdapterKind
from research.weights.adapters.adapter_registry import find_kind
from research.weights.parameter_spec import Spec

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A run's split of the parameters.

    Attributes:
      specs: trained parameters, a (nested) dictionary of `Spec`.
      frozen_specs: frozen parameters by path; empty in full training.
      frozen_dtype: dtype in which frozen parameters are kept.
      dtype: dtype of the trained parameters.
      init: `(key, base) -> params`, the start of the trained parameters.
      forward: `(params, frozen, key) -> model parameters`; `key` switches the dropout
        of adapters on and is None in evaluation.
      kind: of the adapters; None in full training.
    """

    specs: dict[str, Any]
    frozen_specs: Mapping[str, Any]
    frozen_dtype: Any
    dtype: Any
    init: Callable[[Array, Params], Params]
    forward: Callable[[Params, Params, Array | None], Params]
    kind: AdapterKind | None = None


def make(config: Config, specs: Mapping[str, Spec]) -> Trainable:
    """Decides by `config.trainable`, for a model with parameters `specs`.

    Raises:
      UserError: no adapter kind has the name `config.lora.kind`, targets match nothing,
        or a rank is below 1.
    """
    if config.trainable == "lora":
        kind = find_kind(config.lora.kind)
        return Trainable(
            specs=kind.specs(specs, config.lora),
            frozen_specs=specs,
            frozen_dtype=jnp.dtype(config.model.dtype),
            dtype=jnp.dtype(jnp.float32),
            init=lambda key, base: kind.init(key, specs, config.lora, base),
            forward=lambda params, frozen, key: kind.adapt(
                frozen, params, config.lora, key
            ),
            kind=kind,
        )
    return Trainable(
        specs=dict(specs),
        frozen_specs={},
        frozen_dtype=jnp.dtype(config.model.dtype),
        dtype=jnp.dtype(config.model.param_dtype),
        init=lambda key, base: base,
        forward=lambda params, frozen, key: params,
    )
