"""The split of a run's parameters into trained and frozen ones.

This is the one place that knows whether a run trains adapters or the whole model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.config.knob_groups import LoRAConfig, ModelConfig
from research.core.errors import UserError, look_up
from research.weights.adapters.adapter_kind import AdapterKind, with_own_patterns
from research.weights.adapters.adapter_registry import find_kind
from research.weights.parameter_spec import Spec
from research.weights.representations.frozen_base_format import find_format
from research.weights.representations.leaf import Matrix

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A run's split of the parameters.

    Attributes:
      specs: trained parameters, a (nested) dictionary of `Spec`.
      frozen_specs: frozen parameters by path as they are stored, each a `Spec` or a
        `Leaf` of `Spec`s; empty in full training.
      frozen_dtype: dtype of stored arrays whose `Spec` fixes no other.
      dtype: dtype of the trained parameters.
      init: `(key, base) -> params`, the start of the trained parameters.
      forward: `(params, frozen, key) -> model parameters`; `key` switches the dropout
        of adapters on and is None in evaluation.
      store: `(path, weight) -> stored form`, in the structure of `frozen_specs`.
      kind: of the adapters; None in full training.
    """

    specs: dict[str, Any]
    frozen_specs: Mapping[str, Any]
    frozen_dtype: Any
    dtype: Any
    init: Callable[[Array, Params], Params]
    forward: Callable[[Params, Params, Array | None], Params]
    store: Callable[[str, Array], Matrix] = lambda path, weight: weight
    kind: AdapterKind | None = None


def make(
    trainable: str,
    model: ModelConfig,
    lora: LoRAConfig,
    specs: Mapping[str, Spec],
) -> Trainable:
    """Splits the parameters `specs` of a model; `trainable` is "lora" or "full".

    Raises:
      UserError: targets match nothing, a rank is below 1, or the whole model is
        trained and the config gives frozen weights a format.
    """
    ways = {"lora": _make_adapters, "full": _make_full}
    return look_up(ways, trainable, "config.trainable")(model, lora, specs)


def _make_adapters(
    model: ModelConfig, lora: LoRAConfig, specs: Mapping[str, Spec]
) -> Trainable:
    kind = find_kind(lora.kind)
    lora = with_own_patterns(lora, specs)
    stored = find_format(model.base_format)
    return Trainable(
        specs=kind.specs(specs, lora),
        frozen_specs={path: stored.specs(spec) for path, spec in specs.items()},
        frozen_dtype=jnp.dtype(model.dtype),
        dtype=jnp.dtype(jnp.float32),
        init=lambda key, base: kind.init(key, specs, lora, base),
        forward=lambda params, frozen, key: kind.adapt(frozen, params, lora, key),
        store=lambda path, weight: stored.store(weight, specs[path]),
        kind=kind,
    )


def _make_full(
    model: ModelConfig, lora: LoRAConfig, specs: Mapping[str, Spec]
) -> Trainable:
    if model.base_format != "plain":
        raise UserError(
            f"config.model.base_format is {model.base_format!r} and "
            "config.trainable is 'full': only frozen weights have a format; use "
            "--config.model.base_format=plain"
        )
    return Trainable(
        specs=dict(specs),
        frozen_specs={},
        frozen_dtype=jnp.dtype(model.dtype),
        dtype=jnp.dtype(model.param_dtype),
        init=lambda key, base: base,
        forward=lambda params, frozen, key: params,
    )
