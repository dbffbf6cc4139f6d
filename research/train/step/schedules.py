"""Learning-rate schedules by name."""

import optax

from research.config.knob_groups import OptimConfig
from research.core.errors import look_up


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of update n, counted from 1, as a function of n.

    Linear warm-up, then to `final` times the peak at the last step: a cosine
    (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts), a line, or
    the peak kept until a linear decay at the end (wsd: Hu et al. 2024,
    arXiv:2404.06395, section 4); or constant after the warm-up.
    """
    warmup = max(1, round(config.warmup * steps))
    peak, rest = config.learning_rate, max(1, steps - warmup)
    end = config.final * peak
    decay = min(rest, max(1, round(config.decay * steps)))
    curves = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": optax.linear_schedule(peak, end, rest),
        "wsd": optax.linear_schedule(peak, end, decay, rest - decay),
        "constant": optax.constant_schedule(peak),
    }
    after = look_up(curves, config.schedule, "config.optim.schedule")
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, after], [warmup])
