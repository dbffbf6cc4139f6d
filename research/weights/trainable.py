"""The split of a run's parameters into trained and frozen ones.

This is the one place that knows whether a run trains adapters or the whole model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from research.config.knob_groups import LoRAConfig, ModelConfig
from research.core.errors import UserError, look_up
from research.weights import parameter_paths
from research.weights.adapters.adapter_kind import AdapterKind, with_own_patterns
from research.weights.adapters.adapter_registry import find_kind
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.parameter_spec import Spec
from research.weights.quantized.block_kind import BlockKind
from research.weights.quantized.formats_by_path import formats_by_path
from research.weights.quantized.kept_codes import kept_specs
from research.weights.representations.leaf import Matrix

Array = jax.Array
Params = dict[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Patterns of paths, by the names that `config.lora.full` has for them.
FULL_GROUPS = {
    "norms": r"norm\.(scale|bias)$",
    "embeddings": r"embedding\.table$",
    "head": r"^head\.kernel$",
    "biases": r"\.bias$",
}


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A run's split of the parameters.

    Attributes:
      specs: trained parameters by path: of an adapted matrix the `Spec` of each factor
        by name, of a parameter that is trained whole its `Spec`.
      frozen_specs: parameters of the base by path as they are stored, each a `Spec` or
        a `Leaf` of `Spec`s; empty in full training. The base's own values of parameters
        that are trained whole are among them, to compare with.
      frozen_dtype: dtype of stored arrays whose `Spec` fixes no other.
      dtype: dtype of the trained parameters.
      init: `(key, base, inputs) -> params`, the start of the trained parameters;
        `inputs` are `InputDirections` by path for adapters that start from them.
      forward: `(params, frozen, key) -> model parameters`; `key` switches the dropout
        of adapters on and is None in evaluation.
      measure: `(params, frozen) -> frozen` for `forward` with these parameters, with
        what gets no gradient computed; a step calls it once for its microbatches.
      store: `(path, weight, spec) -> stored form`, in the structure of `frozen_specs`;
        `spec` describes the parameter, or one of those that are stacked in it.
      kind: of the adapters; None in full training.
      full: paths of the parameters that are trained whole beside adapters.
      keeps_codes: frozen matrices are to stay in the codes of their file.
    """

    specs: dict[str, Any]
    frozen_specs: Mapping[str, Any]
    frozen_dtype: Any
    dtype: Any
    init: Callable[..., Params]
    forward: Callable[[Params, Params, Array | None], Params]
    measure: Callable[[Params, Params], Params] = lambda params, frozen: frozen
    store: Callable[[str, Array, Spec], Matrix] = lambda path, weight, spec: weight
    kind: AdapterKind | None = None
    full: frozenset[str] = frozenset()
    keeps_codes: bool = False

    @property
    def count(self) -> int:
        """Number of scalars that are trained."""
        specs = [spec for spec in jax.tree.leaves(self.specs) if not spec.fixed]
        return sum(x.copies * math.prod(x.shape[x.stacked :]) for x in specs)

    def adapters(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The factors among `params`, or the specs of factors among `specs`."""
        return {path: x for path, x in params.items() if path not in self.full}

    def is_in_codes(self, path: str) -> bool:
        """Whether the frozen parameter at `path` is stored as codes."""
        return not isinstance(self.frozen_specs[path], Spec)

    def used(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The frozen parameters in whose place no trained one stands."""
        return {path: x for path, x in frozen.items() if path not in self.full}

    def off(self, params: Params, frozen: Params) -> Params:
        """Trained parameters of the same shapes with which the model is the base."""
        whole = {path: frozen[path].astype(self.dtype) for path in self.full}
        return self.kind.off(self.adapters(params)) | whole


def make(
    trainable: str,
    model: ModelConfig,
    lora: LoRAConfig,
    specs: Mapping[str, Spec],
    kept: Mapping[str, BlockKind] = MappingProxyType({}),
) -> Trainable:
    """Splits the parameters `specs` of a model; `trainable` is "lora" or "full".

    `kept` has the codes of the matrices that stay as their file has them, by path.

    Raises:
      UserError: targets match nothing, a rank is below 1, or a parameter would be
        trained whole and have an adapter.
    """
    ways = {
        "lora": functools.partial(_make_adapters, kept=kept),
        "full": _make_full,
    }
    return look_up(ways, trainable, "config.trainable")(model, lora, specs)


def require_new_ranks(lora: LoRAConfig, specs: Mapping[str, Spec]) -> None:
    """Refuses ranks of a run that has not begun; older runs may have them.

    Raises:
      UserError: a rank is above those of its matrix.
    """
    if lora.init_from:  # An adapter of another tool is used as it is.
        return
    kind, lora = find_kind(lora.kind), with_own_patterns(lora, specs)
    ranks = parameter_paths.numbers_by_pattern(
        kind.specs(specs, lora), lora.rank_pattern, lora.rank
    )
    for path, rank in ranks.items():
        if fault := kind.new_rank_fault(specs[path], int(rank)):
            raise UserError(f"{path} cannot have this adapter: {fault}")


def _make_adapters(
    model: ModelConfig,
    lora: LoRAConfig,
    specs: Mapping[str, Spec],
    kept: Mapping[str, BlockKind],
) -> Trainable:
    kind = find_kind(lora.kind)
    lora = with_own_patterns(lora, specs)
    adapters = kind.specs(specs, lora)
    full = _full(lora.full, specs)
    # Codes do not train: what is trained whole stays an array.
    formats = formats_by_path(model.quantize, model.quantize_paths, specs, full)
    frozen_specs = {path: formats[path].specs(spec) for path, spec in specs.items()} | {
        path: kept_specs(specs[path], codes)
        for path, codes in kept.items()
        if path not in full
    }
    for path in full:
        if path in adapters:
            raise UserError(
                f"config.lora.full trains {path} whole, and config.lora.targets gives "
                "it an adapter: name it in one of them"
            )

    def init(
        key: Array, base: Params, inputs: Mapping[str, InputDirections] = NOTHING
    ) -> Params:
        whole = {path: base[path].astype(jnp.float32) for path in full}
        return kind.init(key, specs, lora, base, inputs) | whole

    def factors(params: Params) -> Params:
        return {path: params[path] for path in params if path not in full}

    def forward(params: Params, frozen: Params, key: Array | None) -> Params:
        adapted = kind.adapt(frozen, factors(params), lora, key)
        return adapted | {path: params[path] for path in params if path in full}

    def measure(params: Params, frozen: Params) -> Params:
        own = factors(params)
        return kind.measure(frozen, own, kind.settings(kind.ranks(own), lora))

    def store(path: str, weight: Array, spec: Spec) -> Matrix:
        return formats[path].store(weight, spec)

    return Trainable(
        specs=adapters | full,
        frozen_specs=frozen_specs,
        frozen_dtype=jnp.dtype(model.dtype),
        dtype=jnp.dtype(jnp.float32),
        init=init,
        forward=forward,
        measure=measure,
        store=store,
        kind=kind,
        full=frozenset(full),
        keeps_codes=model.quantize == "keep",
    )


def _full(patterns: Sequence[str], specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The parameters that are trained whole.

    Raises:
      UserError: a pattern matches nothing.
    """
    named = {name.strip() for pattern in patterns for name in pattern.split(",")}
    if "head.kernel" not in specs and (tied := {"head", "lm_head"} & named):
        raise UserError(
            f"config.lora.full names {min(tied)!r}, and this model's head is its table "
            "of embeddings: name 'embeddings', which trains both ends"
        )
    own = parameter_paths.own_patterns(patterns, specs, FULL_GROUPS)
    return {path: specs[path] for path in parameter_paths.select(specs, own)}


def _make_full(
    model: ModelConfig, lora: LoRAConfig, specs: Mapping[str, Spec]
) -> Trainable:
    return Trainable(
        specs=dict(specs),
        frozen_specs={},
        frozen_dtype=jnp.dtype(model.dtype),
        dtype=jnp.dtype(model.param_dtype),
        init=lambda key, base, inputs=NOTHING: base,
        forward=lambda params, frozen, key: params,
    )
