"""The optimizers of optax by name, and the guard that skips outlier steps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from research.config.knob_groups import OptimConfig
from research.core.errors import look_up
from research.train.step.schedules import make_schedule
from research.weights import parameter_paths
from research.weights.parameter_spec import Spec

Array = jax.Array


def make_optimizer(
    config: OptimConfig,
    steps: int,
    specs: dict[str, Any],
    schedule: optax.Schedule | None = None,
    factors: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The chain: outlier guard, norm clipping, the optimizer of `config.name`.

    Args:
      config: of the recipe.
      steps: of the whole run, for the schedule.
      specs: of what is trained, a (nested) dictionary of `Spec`.
      schedule: instead of the one of `config`, see `make_schedule`.
      factors: instead of those of `config`, see `rate_factors`.

    Returns:
      A transformation of float32 gradients into float32 updates. Its state is float32,
      too, whatever the dtype of the parameters.

    Raises:
      UserError: a pattern of `no_decay` is no regular expression.
    """
    schedule = schedule or make_schedule(config, steps)
    direction = look_up(DIRECTIONS, config.name, "config.optim.name")
    chain = [
        _where_trained(functools.partial(direction, config), specs),
        optax.add_decayed_weights(config.weight_decay, _decayed(config, specs)),
    ]
    if config.clip_norm > 0:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    step = optax.with_extra_args_support(optax.chain(*chain))
    if config.skip_spread > 0:
        step = skip_outliers(step, config.skip_spread, config.skip_window)
    # Update n, counted from 0, uses the rate of n + 1: a warm-up must not waste its
    # first update at rate 0. The rate is outside the guard, so that skipped steps
    # advance the schedule, too.
    rate = optax.scale_by_learning_rate(lambda count: schedule(count + 1))
    factors = rate_factors(config, specs) if factors is None else factors
    return _in_float32(_by_path(optax.chain(step, rate), factors))


def rate_factors(config: OptimConfig, specs: dict[str, Any]) -> dict[str, float]:
    """By path, what the learning rate is multiplied with; empty where it is 1 for all.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives the factors b a larger rate.

    Raises:
      UserError: an override of `rate_pattern` matches nothing, or has another form.
    """
    if not config.rate_pattern:
        return {}
    paths, _ = parameter_paths.flatten(specs)
    return parameter_paths.numbers_by_pattern(paths, config.rate_pattern, 1.0)


def _by_path(
    inner: optax.GradientTransformationExtraArgs, factors: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """`inner` with its update of each path multiplied; the state is that of `inner`."""

    def update(
        gradients: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params, **extra)
        leaves, structure = parameter_paths.flatten(updates)
        scaled = {path: x * factors[path] for path, x in leaves.items()}
        return parameter_paths.unflatten(structure, scaled), state

    if not factors:
        return inner
    return optax.GradientTransformationExtraArgs(inner.init, update)


def _where_trained(
    make: Callable[[dict[str, Any]], optax.GradientTransformation],
    specs: dict[str, Any],
) -> optax.GradientTransformation:
    """`make(specs)` without state for what is fixed, whose gradient is zero.

    The paths of the state are those of a run that has nothing fixed (as they would not
    be with `optax.masked`), so both can train as one program.
    """

    def trained(tree: Any) -> Any:
        return jax.tree.map(
            lambda s, x: optax.MaskedNode() if s.fixed else x, specs, tree
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        made, state = inner.update(trained(updates), state, trained(params))
        is_left = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(
            lambda m, u: u if is_left(m) else m, made, updates, is_leaf=is_left
        ), state

    if not any(spec.fixed for spec in jax.tree.leaves(specs)):
        return make(specs)
    inner = make(trained(specs))
    return optax.GradientTransformation(
        lambda params: inner.init(trained(params)), update
    )


def _in_float32(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on float32 copies of the parameters, so that all its state is float32.

    In bfloat16 a moment would not decay: 0.999 rounds to 1.
    """

    def wide(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def init(params: Any) -> Any:
        return inner.init(wide(params))

    def update(
        gradients: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        return inner.update(gradients, state, wide(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _adamw(config: OptimConfig, specs: dict[str, Any]) -> optax.GradientTransformation:
    """Kingma and Ba 2015, arXiv:1412.6980; the chain adds decoupled weight decay.

    With it this is AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).
    """
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _adafactor(
    config: OptimConfig, specs: dict[str, Any]
) -> optax.GradientTransformation:
    """Shazeer and Stern 2018, arXiv:1804.04235, sections 3 and 6.

    The step sizes are not relative to the parameters, so that the learning rate has the
    same meaning as for the other optimizers.
    """
    return _on_matrices(
        optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=32),
            optax.clip_by_block_rms(1.0),
        ),
        specs,
    )


def _lion(config: OptimConfig, specs: dict[str, Any]) -> optax.GradientTransformation:
    """Chen et al. 2023, arXiv:2302.06675."""
    return optax.scale_by_lion(config.b1, config.b2)


def _muon(config: OptimConfig, specs: dict[str, Any]) -> optax.GradientTransformation:
    """Orthogonalised momentum for the matrices of layers; tables and norms use Adam.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, scaled to the size
    of AdamW's updates (Liu et al. 2025, arXiv:2502.16982, eq. 4).
    """

    def axes(spec: Spec) -> Any:
        if not _is_layer_matrix(spec):
            return optax.MaskedNode()
        middle = spec.stacked + spec.n_in
        return MuonDimensionNumbers(
            reduction_axis=tuple(range(spec.stacked, middle)),
            output_axis=tuple(range(middle, len(spec.shape))),
        )

    def size(update: Array, spec: Spec) -> Array:
        if not _is_layer_matrix(spec):
            return update
        return update * (0.2 * max(spec.as_matrix.shape[-2:]) ** 0.5)

    by_kind = {
        "muon": scale_by_muon(
            weight_dimension_numbers=lambda _: jax.tree.map(axes, specs)
        ),
        "adam": _adamw(config, specs),
    }
    labels = jax.tree.map(lambda s: "muon" if _is_layer_matrix(s) else "adam", specs)
    return optax.chain(
        optax.partition(by_kind, labels),
        optax.stateless(lambda updates, _: jax.tree.map(size, updates, specs)),
    )


# The step before decay and learning rate, of about unit size per element. The names are
# `config.choices.OPTIMIZERS`.
DIRECTIONS: dict[
    str, Callable[[OptimConfig, dict[str, Any]], optax.GradientTransformation]
] = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "muon": _muon}


def _is_layer_matrix(spec: Spec) -> bool:
    return spec.n_in > 0 and spec.stacked > 0


def _on_matrices(
    inner: optax.GradientTransformation, specs: dict[str, Any]
) -> optax.GradientTransformation:
    """`inner` sees every kernel as the matrix it is, `[*stack, in, out]`.

    Else an optimizer with row and column statistics would take heads for rows.
    """

    def merged(tree: Any) -> Any:
        return jax.tree.map(lambda x, s: x.reshape(s.as_matrix.shape), tree, specs)

    def init(params: Any) -> Any:
        return inner.init(merged(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(merged(updates), state, merged(params))
        split = jax.tree.map(lambda x, s: x.reshape(s.shape), updates, specs)
        return split, state

    return optax.GradientTransformation(init, update)


def _decayed(config: OptimConfig, specs: dict[str, Any]) -> Any:
    """Which parameters weight decay reaches: no bias or sink, nothing of `no_decay`.

    Fixed arrays do not decay.
    """
    paths, structure = parameter_paths.flatten(specs)
    # The default may match nothing: adapters have no norm scales. Others are typos.
    named = [p for p in config.no_decay if p not in OptimConfig().no_decay]
    parameter_paths.select(paths, named)
    never = (*config.no_decay, r"\.(bias|sinks)$")
    spared = {
        p for p, s in paths.items() if s.fixed or parameter_paths.matches(p, never)
    }
    return parameter_paths.unflatten(structure, {p: p not in spared for p in paths})


class SkipState(NamedTuple):
    """Recent losses and gradient norms, how many there were, and updates skipped."""

    losses: Array
    norms: Array
    seen: Array
    skipped: Array
    inner: Any


def skip_outliers(
    inner: optax.GradientTransformationExtraArgs, spread: float, window: int
) -> optax.GradientTransformationExtraArgs:
    """Skips an update whose loss or gradient norm jumps, or is not finite.

    A value jumps if it is more than `spread` standard deviations above the mean of the
    last `window` finite ones (OLMo 2, arXiv:2501.00656, section 3, calls the idea
    skipping spikes). Until `window / 4` values are known, only values that are not
    finite are skipped. A skipped step changes neither parameters nor moments. Its
    values still join the window, so that a new level is accepted in time.
    """

    def init(params: Any) -> SkipState:
        recent = jnp.zeros(window, jnp.float32)
        zero = jnp.zeros((), jnp.int32)
        return SkipState(recent, recent, zero, zero, inner.init(params))

    def update(
        gradients: Any, state: SkipState, params: Any = None, *, loss: Array, **extra
    ) -> tuple[Any, SkipState]:
        norm = optax.tree.norm(gradients)
        filled = jnp.arange(window) < state.seen
        jumps = [
            value > _limit(recent, filled, spread)
            for value, recent in ((loss, state.losses), (norm, state.norms))
        ]
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        known = state.seen >= max(2, window // 4)
        skip = ~finite | (known & (jumps[0] | jumps[1]))
        clean = jax.tree.map(lambda g: jnp.where(skip, 0.0, g), gradients)
        updates, after = inner.update(clean, state.inner, params, **extra)
        slot = state.seen % window
        return jax.tree.map(lambda u: jnp.where(skip, 0.0, u), updates), SkipState(
            jnp.where(finite, state.losses.at[slot].set(loss), state.losses),
            jnp.where(finite, state.norms.at[slot].set(norm), state.norms),
            state.seen + finite,
            state.skipped + skip,
            jax.tree.map(
                lambda old, new: jnp.where(skip, old, new), state.inner, after
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _limit(recent: Array, filled: Array, spread: float) -> Array:
    count = jnp.maximum(jnp.sum(filled), 1)
    mean = jnp.sum(recent * filled) / count
    variance = jnp.sum((recent - mean) ** 2 * filled) / count
    return mean + spread * jnp.sqrt(variance)


def read_skipped(opt_state: Any) -> dict[str, Array]:
    """`{"skipped": updates skipped so far}`; empty without the guard."""
    for part in opt_state if isinstance(opt_state, tuple) else ():
        if isinstance(part, SkipState):
            return {"skipped": part.skipped}
    return {}
