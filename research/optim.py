"""Learning-rate schedule and the optax chain."""

from typing import Any

import jax
import optax

from research.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to `final` times the peak at the last step.

    Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """
    warmup = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final * config.learning_rate,
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) after norm clipping."""
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(
        # Update n (from 0) is trained at the rate of n + 1: the first one counts.
        learning_rate=lambda count: schedule(count + 1),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    if config.clip_norm > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return adamw


def _is_matrix(params: Any) -> Any:
    """Norm scales are not decayed: stacked or not, they have one axis of features."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not jax.tree_util.keystr(path).endswith("scale']"), params
    )
