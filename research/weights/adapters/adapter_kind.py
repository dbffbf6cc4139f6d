"""The protocol of an adapter kind, and the parts that all kinds share.

A kind says what one matrix gets: which arrays, how they start, which `Leaf` they make
of the frozen weight, and their no-op state. The choice of targets, ranks and scales by
path, merging, packing and counting follow here for every kind.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.weights import parameter_paths
from research.weights.adapters.chosen_layers import (
    chosen_layers,
    in_layers,
    only_layers,
)
from research.weights.adapters.measured_inputs import (
    InputDirections,
    input_fault,
    require_inputs,
)
from research.weights.contraction import materialize
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank

Array = jax.Array
Params = dict[str, Any]
Factors = dict[str, Array]
Adapters = dict[str, Factors]
AdapterSpecs = dict[str, dict[str, Spec]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of a `LoRAConfig` that a forward pass uses; they may be traced.

    Attributes:
      scales: by path, alpha / rank, or alpha / sqrt(rank) with rsLoRA.
      streams: by path, the number that tells its dropout keys from those of others.
      dropout: share of adapter inputs dropped.
    """

    scales: dict[str, Array | float]
    streams: dict[str, Array | int]
    dropout: Array | float


class AdapterKind(abc.ABC):
    """One kind of adapter. Instances hold no arrays.

    Throughout, `factors` are the arrays of one adapted path by name, and `adapters`
    are the factors of all paths, float32. Factors that are all zero change nothing
    and get no gradient. They stand for a layer outside of `lora.layers`, and in a pack
    for a matrix that a run does not adapt.

    Attributes:
      name: value of `config.lora.kind`.
      is_exact: the start is a no-op to the last bit; else as far as rounding allows.
      reads_inputs: it starts from what `init` gets as `inputs`.
      has_gains: it also multiplies each output, see `WeightDecomposed`.
      reads_lost: it starts from what codes of the base have lost: no no-op. Its `base`
        has a `LostInCodes` for each adapted path, one of which is in memory at a time.
      decomposes: its start decomposes each matrix in float32, one at a time.
      about_mean: its `inputs` are the directions of the variance, or else those of the
        mean square, in which the mean counts.
      of_trained_tokens: its `inputs` are those at trained tokens, or else at all.
    """

    name: str
    is_exact: bool = True
    reads_inputs: bool = False
    reads_lost: bool = False
    decomposes: bool = False
    has_gains: bool = False
    about_mean: bool = True
    of_trained_tokens: bool = False

    # A kind defines these methods, each about one matrix.

    @abc.abstractmethod
    def matrix_specs(self, spec: Spec, rank: int) -> dict[str, Spec]:
        """Shapes and axis names of the factors of the matrix `spec`.

        Each factor has the stacking axes of `spec` first.
        """

    @abc.abstractmethod
    def init_matrix(
        self, key: Array, specs: Mapping[str, Spec], base: Matrix | None, scale: float
    ) -> Factors:
        """The start of the factors: a no-op.

        Args:
          key: of this path alone.
          specs: what `matrix_specs` gave.
          base: the frozen weight, with its stacking axes; None where the caller has
            none at hand, for kinds that do not look at it.
          scale: of `Settings`.
        """

    @abc.abstractmethod
    def attach_matrix(
        self,
        base: Matrix,
        factors: Factors,
        scale: Array,
        key: Array | None,
        rate: Array | None,
    ) -> Leaf:
        """The leaf that stands for the adapted weight. Computes nothing.

        Args:
          base: the frozen weight, `[*stack, *in, *out]`.
          factors: as `matrix_specs` describes them.
          scale: `[*stack]`, that of `Settings`.
          key: `[*stack]` keys of dropout, or None for no dropout.
          rate: `[*stack]`, share of adapter inputs dropped; None with `key`.
        """

    @abc.abstractmethod
    def rank(self, factors: Mapping[str, Any]) -> int:
        """The rank of these factors (arrays or specs)."""

    @abc.abstractmethod
    def stack_axes(self, base: Any, factors: Mapping[str, Any]) -> int:
        """The number of stacking axes, from shapes alone."""

    def off_matrix(self, factors: Factors) -> Factors:
        """Factors of the same shapes that change nothing."""
        return jax.tree.map(jnp.zeros_like, factors)

    def rank_fault(self, spec: Spec, rank: int) -> str:
        """Why `spec` can have no new adapter of this rank, and a remedy; or ""."""
        return ""

    def new_rank_fault(self, spec: Spec, rank: int) -> str:
        """Why a new run has no use for this rank, and a remedy; or ""."""
        return ""

    def directions(self, rank: int) -> int:
        """How many directions of its inputs a matrix of this rank starts from."""
        return rank

    def source(
        self,
        path: str,
        base: Mapping[str, Matrix],
        inputs: Mapping[str, InputDirections],
    ) -> Any:
        """The `base` of `init_matrix` at a path, from the arguments of `init`."""
        return base.get(path)

    def room(self, rank: int, config: LoRAConfig) -> int:
        """The rank for which the factors have room where `config` gives `rank`."""
        return rank

    def measure_matrix(
        self, base: Matrix, factors: Factors, scale: Array
    ) -> Matrix | Any:
        """`base` with what `attach_matrix` would compute of factors without gradients.

        A step calls it once for all its microbatches.
        """
        return base

    def update_rank(self, factors: Mapping[str, Any]) -> int:
        """The rank of what is added to the frozen weight (arrays or specs)."""
        return self.rank(factors)

    def unmerge_matrix(self, merged: Array, adapted: Leaf) -> Array:
        """The frozen weight, from the merged one; `adapted` has `merged` as its base.

        Raises:
          UserError: adapters of this kind cannot be taken out again.
        """
        if not isinstance(adapted, LowRank):
            raise UserError(
                f"adapters of kind {self.name!r} cannot be taken out of merged weights"
            )
        return (merged.astype(jnp.float32) - adapted.update()).astype(merged.dtype)

    # The methods below work on whole models and follow from those above.

    def specs(self, specs: Mapping[str, Spec], config: LoRAConfig) -> AdapterSpecs:
        """Shapes and axis names of all adapters of a model with parameters `specs`.

        Raises:
          UserError: a target pattern matches no matrix, or a rank is not positive.
        """
        matrices = {path: spec for path, spec in specs.items() if spec.n_in > 0}
        targets = parameter_paths.select(matrices, config.targets)
        if not targets and not config.full:
            raise UserError(
                "config.lora.targets and config.lora.full are empty: nothing would be "
                "trained"
            )
        ranks = parameter_paths.numbers_by_pattern(
            targets, config.rank_pattern, config.rank
        )
        chosen = chosen_layers(config.layers, targets, specs)
        adapters = {}
        for path in targets:
            rank = int(ranks[path])
            if rank < 1 or rank != ranks[path]:
                raise UserError(
                    f"lora rank for {path} is {ranks[path]}; it must be a whole number "
                    "from 1"
                )
            rank = self.room(rank, config)
            fault = self.rank_fault(matrices[path], rank)
            if self.reads_inputs:
                fault = input_fault(self.name, matrices[path]) or fault
            # An adapter of another tool is used as it is.
            if fault and not config.init_from:
                raise UserError(f"{path} cannot have this adapter: {fault}")
            own = self.matrix_specs(matrices[path], rank)
            adapters[path] = in_layers(own, chosen)
        return adapters

    def init(
        self,
        key: Array,
        specs: Mapping[str, Spec],
        config: LoRAConfig,
        base: Mapping[str, Matrix] = MappingProxyType({}),
        inputs: Mapping[str, InputDirections] = MappingProxyType({}),
    ) -> Adapters:
        """All adapters at their start, float32.

        `specs` are those of the model's parameters. `base` has their values, for kinds
        that start from them, and `inputs` those of their inputs.

        Raises:
          UserError: the inputs of a matrix have not been measured.
        """
        own = self.specs(specs, config)
        if self.reads_inputs:
            require_inputs(self.name, own, inputs)
        scales = self.settings(self.ranks(own), config).scales
        started = {}
        for index, (path, factors) in enumerate(own.items()):
            own_key = jax.random.fold_in(key, index)
            start = self.init_matrix(  # Nothing else holds the source of a path.
                own_key, factors, self.source(path, base, inputs), scales[path]
            )
            started[path] = {
                k: only_layers(x, factors[k].layers) for k, x in start.items()
            }
        return started

    def ranks(self, adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """The rank of each path (arrays or specs)."""
        return {path: self.rank(factors) for path, factors in adapters.items()}

    def settings(self, ranks: Mapping[str, int], config: LoRAConfig) -> Settings:
        """The numbers that `config` gives adapters of these ranks, by path."""
        alphas = parameter_paths.numbers_by_pattern(
            ranks, config.alpha_pattern, config.alpha
        )
        power = 0.5 if config.rslora else 1.0
        return Settings(
            scales={path: alphas[path] / rank**power for path, rank in ranks.items()},
            streams={path: index for index, path in enumerate(sorted(ranks))},
            dropout=config.dropout,
        )

    def attach(
        self,
        params: Params,
        adapters: Adapters,
        settings: Settings,
        key: Array | None = None,
    ) -> Params:
        """As `adapt`, with settings that may not follow from the shapes of factors."""
        adapted = dict(params)
        for path, factors in sorted(adapters.items()):
            if path not in params:
                raise ValueError(f"adapter for {path!r}, which the model does not have")
            base = params[path]
            stack = tuple(base.shape[: self.stack_axes(base, factors)])
            keys = rate = None
            if key is not None:
                own = jax.random.fold_in(key, settings.streams[path])
                keys = jax.random.split(own, stack)
                keys = keys if stack else keys.reshape(())
                rate = jnp.full(stack, settings.dropout)
            scale = jnp.full(stack, settings.scales[path], jnp.float32)
            adapted[path] = self.attach_matrix(base, factors, scale, keys, rate)
        return adapted

    def measure(self, params: Params, adapters: Adapters, settings: Settings) -> Params:
        """`params` for `attach` with these adapters; see `measure_matrix`."""
        measured = dict(params)
        for path, factors in adapters.items():
            stack = params[path].shape[: self.stack_axes(params[path], factors)]
            scale = jnp.full(stack, settings.scales[path], jnp.float32)
            measured[path] = self.measure_matrix(params[path], factors, scale)
        return measured

    def adapt(
        self,
        params: Params,
        adapters: Adapters,
        config: LoRAConfig,
        key: Array | None = None,
    ) -> Params:
        """`params` with a `Leaf` in the place of every adapted weight.

        `params` are flat and not changed. `key` switches dropout on.
        """
        settings = self.settings(self.ranks(adapters), config)
        key = key if config.dropout > 0.0 else None
        return self.attach(params, adapters, settings, key)

    def merge(self, params: Params, adapters: Adapters, config: LoRAConfig) -> Params:
        """Plain arrays with the adapters added in, each in its base leaf's dtype."""
        adapted = self.adapt(params, adapters, config)
        return {path: materialize(leaf) for path, leaf in adapted.items()}

    def unmerge(self, params: Params, adapters: Adapters, config: LoRAConfig) -> Params:
        """Undoes `merge`, up to rounding in the dtype of the parameters.

        Raises:
          UserError: adapters of this kind cannot be taken out again.
        """
        adapted = self.adapt(params, adapters, config)
        return {
            path: self.unmerge_matrix(leaf, adapted[path]) if path in adapters else leaf
            for path, leaf in params.items()
        }

    def off(self, adapters: Adapters) -> Adapters:
        """Adapters of the same shapes that change nothing."""
        return {path: self.off_matrix(x) for path, x in adapters.items()}

    def union(
        self, specs: Mapping[str, Spec], ranks: Sequence[Mapping[str, int]]
    ) -> AdapterSpecs:
        """Shapes that hold adapters of all `ranks`, the largest of each path."""
        adapted = {path for own in ranks for path in own}
        return {
            path: self.matrix_specs(spec, max(own.get(path, 0) for own in ranks))
            for path, spec in specs.items()
            if path in adapted
        }

    def pad(self, adapters: Adapters, wide: AdapterSpecs) -> Adapters:
        """The same adapters in the shapes that `union` gave.

        The padding changes no output and gets no gradient, so it stays as it is.
        """
        return parameter_paths.pad_with_zeros(adapters, wide)


def with_own_patterns(config: LoRAConfig, specs: Mapping[str, Spec]) -> LoRAConfig:
    """`config` with our patterns where it has names of other tools' modules.

    Raises:
      UserError: a pattern matches neither a path nor a name of a matrix.
    """
    matrices = {path: spec for path, spec in specs.items() if spec.n_in > 0}

    def own(override: str) -> list[str]:
        pattern, equals, number = override.rpartition("=")
        if not equals:
            return [override]
        found = parameter_paths.own_patterns([pattern], matrices)
        return [f"{each}={number}" for each in found]

    return dataclasses.replace(
        config,
        targets=parameter_paths.own_patterns(config.targets, matrices),
        rank_pattern=tuple(x for each in config.rank_pattern for x in own(each)),
        alpha_pattern=tuple(x for each in config.alpha_pattern for x in own(each)),
    )
