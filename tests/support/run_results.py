"""Results of a run: numbers, states, and whether two runs are equal."""

import json
import struct

import jax
import numpy as np
import orbax.checkpoint as ocp
from commands import (
    STEPS,
)
from pretraining_runs import PRETRAIN_STEPS

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import MeshConfig
from research.data.grouped_values import by_group
from research.formats.base_model import open_base
from research.parallel import mesh
from research.runs.run_directory import RunDir
from research.tasks import task_registry
from research.train.step.definition_from_config import make_step_definition
from research.train.step.train_step import abstract_state


def numbers(place, run):
    """The values that must not depend on how often a run was broken off."""
    train = [
        (x["step"], x["loss"], x["grad_norm"], x["learning_rate"], x["tokens"])
        for x in place.lines(run, "train")
    ]
    held = {
        x["step"]: (x["loss"], by_group(x, "loss")) for x in place.lines(run, "eval")
    }
    return train, held


def final_state(place, run):
    folder = RunDir(place.run_dir(run))
    config = folder.config()
    devices = mesh.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    definition = make_step_definition(
        config,
        open_base(str(place.folder / config.model.init_from)),
        devices,
        task_registry.make_objective(config, devices),
    )
    with Checkpointer(
        folder.checkpoints, config.checkpoint, folder.identity(), read_only=True
    ) as checkpointer:
        restored = checkpointer.restore(abstract_state(definition))
    assert restored.step == int(restored.state.step) == STEPS
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), restored.state)


def saved_state(place, run, step=PRETRAIN_STEPS):
    """Everything in a checkpoint, on one device, whichever mesh wrote it."""
    item = place.run_dir(run) / "checkpoints" / str(step) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            checkpointer.metadata(item).item_metadata.tree,
        )
        return checkpointer.restore(item, wanted)


def history(place, run):
    return json.loads((place.run_dir(run) / "run.json").read_text())


def hashes(place, run):
    return [line["batch_hash"] for line in place.lines(run, "train")]


def check_equal(place, run, unbroken):
    assert numbers(place, run) == numbers(place, unbroken)
    assert hashes(place, run) == hashes(place, unbroken)


def tensorboard_events(run):
    """Every event of a run directory, read by the format of TFRecord files."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((run / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
