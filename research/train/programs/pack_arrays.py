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

from research.config.run_config import Config
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

Array = jax.Array
Factors = dict[str, dict[str, Spec]]


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


def union(
    specs: Mapping[str, Spec], configs: Sequence[Config]
) -> tuple[AdapterKind, Factors]:
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
    kind, lora = _kind(config), with_own_patterns(config.lora, specs)
    own = kind.specs(specs, lora)
    known = kind.settings(kind.ranks(own), lora)
    rates = optimizers.rate_factors(config.optim, own)
    paths = parameter_paths.flatten(factors)[0] if has_factors else {}
    schedule = make_schedule(config.optim, config.steps)
    return RunNumbers(
        seed=jnp.int32(config.seed),
        rates=jax.jit(jax.vmap(schedule))(jnp.arange(1, config.steps + 1)),
        factors={path: jnp.float32(rates.get(path, 1.0)) for path in paths},
        settings=Settings(
            scales={p: jnp.float32(known.scales.get(p, 0.0)) for p in factors},
            # Without an adapter any stream will do: dropout drops only zeros.
            streams={p: jnp.uint32(known.streams.get(p, 0)) for p in factors},
            dropout=jnp.float32(known.dropout),
        ),
    )


def stack(parts: Sequence[Any]) -> Any:
    """Trees of one shape as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def widen(own: TrainState, wide: TrainState, kind: AdapterKind) -> TrainState:
    """A run's state in the shapes of `wide` (abstract).

    Moments and the like are padded with zeros; `kind` pads the adapters.
    """
    padded = parameter_paths.pad_with_zeros(own, wide)
    return dataclasses.replace(padded, params=kind.pad(own.params, wide.params))


def narrow(wide: Any, index: int, own: Any) -> Any:
    """Run `index` of the stacked state `wide`, as `own` (abstract, with shardings)."""
    known, _ = parameter_paths.flatten(wide)
    leaves, structure = parameter_paths.flatten(own)

    def one(path: str, leaf: Any) -> Array:
        # Copied before the next step donates it.
        value = np.asarray(known[path][index])
        return jax.device_put(value[tuple(map(slice, leaf.shape))], leaf.sharding)

    return parameter_paths.unflatten(
        structure, {p: one(p, x) for p, x in leaves.items()}
    )
