"""Eight virtual CPU devices, one tiny model and the real files, shared by all tests."""

import os

# Before JAX starts, and before the hub's client reads its settings.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(os.path.dirname(__file__), "no-hub-cache-here")

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from research.data.packing import Document, build_batch, pack
from research.models.presets import Architecture
from research.models.transformer import Model

jax.config.update("jax_num_cpu_devices", 8)
ROOT = Path(__file__).parents[1]

# No two sizes are equal, so that swapped axes show; what a mesh splits divides by 4.
TINY = Architecture(
    vocab=96, embed=40, mlp=56, layers=2, heads=8, kv_heads=4, head_dim=10,
    tied_head=False,
)  # fmt: skip


def random_params(specs, seed=0):
    """NumPy values in a model's shapes; norms are not all ones, or none would miss."""
    rng = np.random.default_rng(seed)
    values = {path: rng.normal(size=spec.shape) for path, spec in specs.items()}
    scaled = {p: v * specs[p].std or 1 + 0.2 * v for p, v in values.items()}
    return {path: jax.numpy.float32(value) for path, value in scaled.items()}
