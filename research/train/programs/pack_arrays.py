"""The numbers that runs of a pack do not share, as arrays.

Adapters are padded with zeros to the largest rank, and are all zero where a run adapts
fewer matrices. Zeros stay zero: they get no gradient (the one of a column of A has the
matching row of B as a factor, and the reverse), and an optimizer that works on each
element alone (`compatibility.PADDED_OPTIMIZERS`) makes no step from a zero gradient.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from research.config.run_config import Config
from research.parallel import mesh as meshes
from research.train.step import optimizers
from research.train.step.schedules import make_schedule
from research.train.step.train_step import TrainState
from research.weights import parameter_paths
from research.weights.adapters.adapter_kind import (
    AdapterKind,
    Settings,
    with_own_patterns,
)
from research.weights.adapters.adapter_registry import find_kind
from research.weights.parameter_spec import Spec
from research.weights.trainable import Trainable

Array = jax.Array
Factors = dict[str, dict[str, Spec]]
Union = tuple[AdapterKind, Factors]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """The numbers of a step that differ from run to run; stacked over the runs.

    Attributes:
      seed: int32, seeds dropout.
      rates: `[steps]`, learning rate of each update.
      factors: of the rate, by path; empty where it is 1 for all runs.
      settings: of its adapters, for every path that any run of the pack adapts.
    """

    seed: Array
    rates: Array
    factors: dict[str, Array]
    settings: Settings


def union(specs: Mapping[str, Spec], configs: Sequence[Config]) -> Union:
    """The kind with the most arrays, and its factors of the largest rank by path.

    Kinds that train together compute the same where the arrays of another are zero.

    Raises:
      UserError: a run has no adapters of its own kind.
    """
    ranks = []
    for config in configs:  # Each kind judges its own ranks alone.
        kind, lora = _kind(config), with_own_patterns(config.lora, specs)
        ranks.append(kind.ranks(kind.specs(specs, lora)))
    unions = [(kind, kind.union(specs, ranks)) for kind in map(_kind, configs)]
    return max(unions, key=lambda made: len(jax.tree.leaves(made[1])))


def _kind(config: Config) -> AdapterKind:
    return find_kind(config.lora.kind)


def run_numbers(
    config: Config,
    specs: Mapping[str, Spec],
    factors: Factors,
    has_factors: bool,
) -> RunNumbers:
    """The numbers of one run, over the paths of `factors`.

    `has_factors`: any run of the pack has a `rate_pattern`.
    """
    own = _kind(config).specs(specs, with_own_patterns(config.lora, specs))
    rates = optimizers.rate_factors(config.optim, own)
    paths = parameter_paths.flatten(factors)[0] if has_factors else {}
    schedule = make_schedule(config.optim, config.steps)
    return RunNumbers(
        seed=jnp.int32(config.seed),
        rates=jax.jit(jax.vmap(schedule))(jnp.arange(1, config.steps + 1)),
        factors={path: jnp.float32(rates.get(path, 1.0)) for path in paths},
        settings=_settings(config, specs, factors),
    )


def _settings(config: Config, specs: Mapping[str, Spec], factors: Factors) -> Settings:
    kind, lora = _kind(config), with_own_patterns(config.lora, specs)
    known = kind.settings(kind.ranks(kind.specs(specs, lora)), lora)
    return Settings(
        scales={p: jnp.float32(known.scales.get(p, 0.0)) for p in factors},
        # Without an adapter any stream will do: dropout drops only zeros.
        streams={p: jnp.uint32(known.streams.get(p, 0)) for p in factors},
        dropout=jnp.float32(known.dropout),
    )


def alike(
    config: Config, split: Trainable, specs: Mapping[str, Spec], mesh: Mesh, wide: Union
) -> Trainable:
    """The split of one run, with a `forward` whose results are alike for all of a pack.

    They have the same shapes, so programs that read them compile once for all runs.
    Outside of a program only, and without dropout.
    """
    kind, factors = wide
    settings = _settings(config, specs, factors)
    shapes = meshes.abstract_arrays(factors, mesh, split.dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def forward(params: Any, frozen: dict[str, Any], key: None) -> dict[str, Any]:
        padded = jax.device_put(kind.pad(params, shapes), shardings)
        return kind.attach(frozen, padded, settings, key)

    return dataclasses.replace(split, forward=forward)


def stack(parts: Sequence[Any]) -> Any:
    """Trees of one shape as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def widen(own: TrainState, wide: TrainState, kind: AdapterKind) -> TrainState:
    """A run's state in the shapes of `wide` (abstract).

    Moments and the like are padded with zeros; `kind` pads the adapters.
    """
    padded = parameter_paths.pad_with_zeros(own, wide)
    return dataclasses.replace(padded, params=kind.pad(own.params, wide.params))


def narrow(wide: Any, own: Any) -> Any:
    """The state `wide` of a run in the shapes of `own` (abstract, with shardings)."""
    known, _ = parameter_paths.flatten(wide)
    leaves, structure = parameter_paths.flatten(own)

    def one(path: str, leaf: Any) -> Array:
        # Copied before the next step donates it.
        value = np.asarray(known[path])
        return jax.device_put(value[tuple(map(slice, leaf.shape))], leaf.sharding)

    return parameter_paths.unflatten(
        structure, {p: one(p, x) for p, x in leaves.items()}
    )
