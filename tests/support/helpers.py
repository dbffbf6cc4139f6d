"""The tiny architecture of all tests, its random values, and what counts as equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config.run_config import MeshConfig
from research.models.architecture import Architecture

# No two sizes are equal, so that swapped axes show; what a mesh splits divides by 4.
TINY = Architecture(
    vocab=96,
    embed=40,
    mlp=56,
    layers=2,
    heads=8,
    kv_heads=4,
    head_dim=10,
    tied_head=False,
)


def mesh_sizes(data=1, fsdp=1, tensor=1, replica=1, context=1, expert=1):
    """A `MeshConfig`, the axes that most tests split first."""
    return MeshConfig(replica, data, fsdp, tensor, context, expert)


def random_params(specs, seed=0):
    """Values in a model's shapes; norm scales are not all ones, or a lost one hides.

    NumPy draws them: compiling a random draw for each shape takes JAX a second.
    """
    rng = np.random.default_rng(seed)
    noise = {path: rng.normal(size=spec.shape) for path, spec in specs.items()}
    scaled = {path: x * (specs[path].std or 0.2) for path, x in noise.items()}
    return {path: jnp.float32(x + (not specs[path].n_in)) for path, x in scaled.items()}


def random_adapters(factor_specs, seed=5):
    """As if trained for a while: with B zero, A would get no gradient."""
    rng = np.random.default_rng(seed)
    return {
        path: {k: jnp.float32(0.1 * rng.normal(size=s.shape)) for k, s in f.items()}
        for path, f in factor_specs.items()
    }


def close(actual, expected, rtol=1e-5):
    """Each leaf is within `rtol` of its largest value: rounding follows the sums."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.abs(e).max()), 1e-30)
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * scale)


def in_soak(*values):
    """A case of `pytest.mark.parametrize` for `make soak` alone."""
    return pytest.param(*values, marks=pytest.mark.soak)
