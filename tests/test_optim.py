"""The schedule's ends, and what weight decay and clipping reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import OptimConfig
from research.optim import make_optimizer, make_schedule


def test_the_rate_warms_up_peaks_and_ends_at_its_share():
    config = OptimConfig(learning_rate=1e-3, warmup=0.1, final=0.1)
    rate = np.array([make_schedule(config, 100)(n) for n in range(101)])
    assert rate.argmax() == 10
    np.testing.assert_allclose(rate[[0, 5, 10, 100]], [0, 5e-4, 1e-3, 1e-4], rtol=1e-5)
    assert (np.diff(rate[10:]) < 0).all()
    np.testing.assert_allclose(rate[55], (1e-3 + 1e-4) / 2, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_no_run_is_too_short_for_a_schedule(steps, warmup):
    schedule = make_schedule(OptimConfig(warmup=warmup), steps)
    rates = np.array([schedule(n) for n in range(1, steps + 1)])
    assert np.isfinite(rates).all() and (rates > 0).all()


def moved(config, gradient, params):
    optimizer = make_optimizer(config, steps=10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    return jax.tree.map(float, jax.tree.map(jnp.mean, updates))


def test_the_first_update_is_not_lost_to_a_rate_of_zero():
    config = OptimConfig(learning_rate=1e-2, warmup=0.5, clip_norm=0.0)
    update = moved(config, {"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    # Adam's first update has the size of the rate: one fifth of the peak.
    np.testing.assert_allclose(update["w"], -2e-3, rtol=1e-3)


def test_weight_decay_spares_norms():
    params = {
        "final_norm.scale": jnp.ones(4),
        "layers.mlp_norm.scale": jnp.ones((2, 4)),
        "layers.mlp.up.kernel": jnp.ones((2, 4, 4)),
    }
    still = jax.tree.map(jnp.zeros_like, params)
    update = moved(OptimConfig(weight_decay=0.5), still, params)
    assert update["final_norm.scale"] == update["layers.mlp_norm.scale"] == 0
    assert update["layers.mlp.up.kernel"] < 0


def test_weight_decay_reaches_the_factors_of_adapters():
    params = {"mlp.up.kernel": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}
    still = jax.tree.map(jnp.zeros_like, params)
    update = moved(OptimConfig(weight_decay=0.5), still, params)["mlp.up.kernel"]
    assert update["a"] < 0 and update["b"] < 0


def test_clipping_is_by_the_norm_of_all_gradients_together():
    """A large eps makes AdamW's update follow the gradient's size."""
    params = {"u": jnp.zeros(1), "w": jnp.zeros(1)}
    gradient = {"u": jnp.full(1, 30.0), "w": jnp.full(1, 40.0)}
    free = moved(OptimConfig(eps=1e6, clip_norm=0.0), gradient, params)
    clipped = moved(OptimConfig(eps=1e6, clip_norm=1.0), gradient, params)
    for name in params:
        np.testing.assert_allclose(clipped[name], free[name] / 50, rtol=1e-3)
