"""Small states and their checkpoints, for the tests of saving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import CheckpointConfig

# Where a save or a restore fails Orbax leaves futures whose errors nobody asks for.
FUTURES = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)

IDENTITY = {"base model": "b", "tokenizer": "t", "data": "d"}
POSITION = {"data": {"next": 7}, "pulled": 7, "elapsed": 1.5}
KEEP = CheckpointConfig(keep_last=3, keep_best=0)
LOSSES = {1: 2.125, 2: 2.25, 3: 2.5}


def make_state(step, rows=64):
    """Split over eight devices, a moment beside it, and a counter on all of them."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    values = np.random.default_rng(step).normal(size=(rows, 16)).astype(np.float32)
    split = NamedSharding(mesh, PartitionSpec("x"))
    return {
        "params": {"w": jax.device_put(values, split)},
        "moment": {"w": jax.device_put(-values, split)},
        "step": jax.device_put(jnp.int32(step), NamedSharding(mesh, PartitionSpec())),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def open_checkpoints(folder, **options):
    return Checkpointer(folder / "checkpoints", KEEP, IDENTITY, **options)


def save_steps(folder, *steps):
    with open_checkpoints(folder) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), POSITION, LOSSES[step])


def flip_one(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
