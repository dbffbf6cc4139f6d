"""LoRA as functions from parameters to parameters.

Hu et al. 2021, arXiv:2106.09685: a frozen matrix W is used as W + (alpha / rank) A B
with A `[*in, rank]` random and B `[rank, *out]` zero, so training starts at the base
model exactly. Nothing here computes a forward pass:

    adapters = init(key, specs, config)           # float32 factors, small
    params = adapt(base, adapters, config)        # leaves swapped for LowRank
    params = merge(base, adapters, config)        # or plain arrays, for deployment

Models that multiply through `contract` take `adapt`ed parameters as they are,
and no full-size gradient is ever formed. For any other function of parameters there
is `lift`, which merges inside; it forms the full weight gradient on the way back,
about as costly as full fine-tuning in time, and still trains only the factors.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.weights import parameter_paths
from research.weights.contraction import materialize
from research.weights.parameter_spec import Spec
from research.weights.representations.low_rank import LowRank

Array = jax.Array
Params = dict[str, Any]
Adapters = dict[str, dict[str, Array]]


def adapter_specs(
    specs: Mapping[str, Spec], config: LoRAConfig
) -> dict[str, dict[str, Spec]]:
    """Shapes and axis names of the factors, derived from the base matrices'.

    Raises:
      UserError: a target pattern matches no matrix, or a rank is not positive.
    """
    matrices = {path: spec for path, spec in specs.items() if spec.n_in > 0}
    targets = parameter_paths.select(matrices, config.targets)
    if not targets:
        raise UserError("config.lora.targets is empty: nothing would be trained")
    ranks = _by_pattern(targets, config.rank_pattern, config.rank)
    factors = {}
    for path in targets:
        spec, rank = matrices[path], int(ranks[path])
        if rank < 1 or rank != ranks[path]:
            raise UserError(
                f"lora rank for {path} is {ranks[path]}; it must be a whole number "
                "from 1"
            )
        split = spec.stacked + spec.n_in
        stack, stack_axes = spec.shape[: spec.stacked], spec.axes[: spec.stacked]
        a = dataclasses.replace(
            spec,
            shape=(*spec.shape[:split], rank),
            axes=(*spec.axes[:split], "rank"),
        )
        b = dataclasses.replace(
            spec,
            shape=(*stack, rank, *spec.shape[split:]),
            axes=(*stack_axes, "rank", *spec.axes[split:]),
            n_in=1,
        )
        factors[path] = {"a": a, "b": b}
    return factors


def init(key: Array, specs: Mapping[str, Spec], config: LoRAConfig) -> Adapters:
    """Float32 factors: A uniform in +-1/sqrt(fan_in) (as PEFT has it), B zero."""
    adapters = {}
    for index, (path, factor) in enumerate(adapter_specs(specs, config).items()):
        bound = math.prod(factor["a"].in_shape) ** -0.5
        own = jax.random.fold_in(key, index)
        adapters[path] = {
            "a": _uniform(own, factor["a"], bound),
            "b": jnp.zeros(factor["b"].shape, jnp.float32),
        }
    return adapters


def _uniform(key: Array, spec: Spec, bound: float) -> Array:
    # Drawn as rows, the same numbers: a CPU takes seconds to compile the random bits of
    # three axes. What a mesh splits of A is its first input axis, the first of a row:
    # `mesh.RULES` splits no other, and no device has the whole factor.
    rows = (*spec.shape[: spec.stacked], math.prod(spec.shape[spec.stacked :]))
    drawn = jax.random.uniform(key, rows, jnp.float32, -bound, bound)
    return drawn.reshape(spec.shape)


def adapt(
    params: Params, adapters: Adapters, config: LoRAConfig, key: Array | None = None
) -> Params:
    """`params` with every adapted leaf swapped for a `LowRank`; computes nothing.

    Args:
      params: the flat base parameters; not changed.
      adapters: what `init` made, trained or not.
      config: gives alpha, and the dropout rate that `key` switches on.
      key: a typed PRNG key for LoRA dropout, or None (evaluation).
    """
    ranks = {path: factor["a"].shape[-1] for path, factor in adapters.items()}
    key = key if config.dropout > 0.0 else None
    return attach(params, adapters, settings(ranks, config), key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of a `LoRAConfig` that a forward pass uses; they may be traced.

    Attributes:
      scales: alpha / rank by path.
      streams: by path, a number of its own for the dropout's keys.
      dropout: share of adapter inputs dropped.
    """

    scales: dict[str, Array | float]
    streams: dict[str, Array | int]
    dropout: Array | float


def settings(ranks: Mapping[str, int], config: LoRAConfig) -> Settings:
    """What `config` comes to for adapters of these ranks, by path."""
    alphas = _by_pattern(ranks, config.alpha_pattern, config.alpha)
    return Settings(
        scales={path: alphas[path] / rank for path, rank in ranks.items()},
        streams={path: index for index, path in enumerate(sorted(ranks))},
        dropout=config.dropout,
    )


def attach(
    params: Params, adapters: Adapters, settings: Settings, key: Array | None = None
) -> Params:
    """As `adapt`, of settings that need not follow from the factors' shapes."""
    adapted = dict(params)
    for path, factor in sorted(adapters.items()):
        if path not in params:
            raise ValueError(f"adapter for {path!r}, which the model does not have")
        stack, keys = _stack(params[path], factor), None
        if key is not None:
            own = jax.random.fold_in(key, settings.streams[path])
            keys = jax.random.split(own, stack)
            keys = keys if stack else keys.reshape(())
        adapted[path] = LowRank(
            base=params[path],
            a=factor["a"],
            b=factor["b"],
            scale=jnp.full(stack, settings.scales[path], jnp.float32),
            key=keys,
            rate=None if keys is None else jnp.full(stack, settings.dropout),
        )
    return adapted


def merge(params: Params, adapters: Adapters, config: LoRAConfig) -> Params:
    """Plain arrays with the adapters added in, each in its base leaf's dtype."""
    adapted = adapt(params, adapters, config)
    return {path: materialize(leaf) for path, leaf in adapted.items()}


def unmerge(params: Params, adapters: Adapters, config: LoRAConfig) -> Params:
    """Undoes `merge` up to rounding in the parameters' dtype."""
    adapted = adapt(params, adapters, config)
    return {path: _subtract(leaf) for path, leaf in adapted.items()}


def lift(function: Callable[..., Any], config: LoRAConfig) -> Callable[..., Any]:
    """`function(params, ...)` as `lifted(params, adapters, ...)`, for any pytree.

    Works for models that know nothing of `contract` (another Flax module, a plain
    function). `params` may be nested; adapters are keyed by dotted path, see
    `specs_of`.
    """

    @functools.wraps(function)
    def lifted(params: Any, adapters: Adapters, *args: Any, **kwargs: Any) -> Any:
        flat, structure = parameter_paths.flatten(params)
        merged = merge(flat, adapters, config)
        return function(parameter_paths.unflatten(structure, merged), *args, **kwargs)

    return lifted


def specs_of(params: Any) -> dict[str, Spec]:
    """Specs of a foreign model's parameters, for `init` with `lift`.

    Arrays of two or more axes count as matrices that sum over all but their last
    axis, which is how Flax shapes its dense and convolution kernels.
    """
    flat, _ = parameter_paths.flatten(params)
    return {
        path: Spec(
            shape=tuple(leaf.shape),
            axes=tuple(f"axis{i}" for i in range(leaf.ndim)),
            n_in=leaf.ndim - 1 if leaf.ndim > 1 else 0,
        )
        for path, leaf in flat.items()
    }


def count(adapters: Adapters) -> int:
    """Number of trained scalars."""
    return parameter_paths.count(adapters)


def _by_pattern(
    paths: Mapping[str, Any], overrides: Sequence[str], default: float
) -> dict[str, float]:
    """One number a path: that of the last `pattern=number` matching it, or default."""
    numbers = {}
    for override in overrides:
        pattern, equals, number = override.rpartition("=")
        numbers.pop(pattern, None)  # so that it counts as the last
        try:
            numbers[pattern] = float(number)
        except ValueError:
            equals = ""
        if not equals or not 0 < numbers[pattern] < math.inf:
            raise UserError(
                f"{override!r} is not 'pattern=number' with a number above 0, "
                "such as 'mlp=4'"
            )
    chosen = parameter_paths.select(paths, tuple(numbers))
    return {path: numbers.get(chosen.get(path), default) for path in paths}


def _stack(leaf: Any, factor: dict[str, Array]) -> tuple[int, ...]:
    """The stacking shape, from shapes alone.

    `a` is `[*stack, *in, rank]` and `b` `[*stack, rank, *out]`, so together they
    have the base's axes, two for the rank, and the stack twice.
    """
    a, b = factor["a"], factor["b"]
    stacked = a.ndim + b.ndim - 2 - len(leaf.shape)
    return tuple(leaf.shape[:stacked])


def _subtract(leaf: Any) -> Any:
    if not isinstance(leaf, LowRank):
        return leaf
    return (leaf.base.astype(jnp.float32) - leaf.update()).astype(leaf.base.dtype)
