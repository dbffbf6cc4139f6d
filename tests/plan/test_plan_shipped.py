"""Shipped configs are planned as they are trained, on slices that exist."""

import dataclasses
import importlib
import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import in_soak
from plan_helpers import preset_of

from research.config.run_config import Config, MeshConfig, ModelConfig, from_config_dict
from research.data.token_batch import Batch
from research.formats.base_model import Base
from research.parallel import mesh as meshes
from research.plan import abstract_step
from research.plan.compiled import compile_step
from research.plan.planned_devices import parse_device, parse_topology
from research.tokenize.tokenizer_training import byte_tokenizer
from research.train.step import train_step
from research.train.step.definition_from_config import make_step_definition

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("[a-z]*.py"))
# test_plan.py has a LoRA config; the default model would be read from its file.
QUICK = ("pretrain_8b", "pretrain_tiny")


@pytest.mark.parametrize(
    "file",
    [x if x.stem in QUICK else in_soak(x) for x in SHIPPED],
    ids=lambda file: file.stem,
)
def test_a_shipped_config_is_planned_as_it_is_trained(file, request):
    """Line by line; training's side takes its shardings where its loaders do."""
    module = importlib.import_module(f"configs.{file.stem}")
    config = from_config_dict(module.get_config())
    if config.model.init_from == ModelConfig().init_from:
        shape = request.getfixturevalue("smollm2").architecture
    else:
        shape = abstract_step.find_architecture(config, preset_of(config))
    # The mesh of the config is of a slice; its axes on the devices that are here.
    devices = jax.devices()[: math.gcd(8, config.data.rows_per_pass)]
    mesh = meshes.make_mesh(dataclasses.replace(config.mesh, replica=1), devices)
    step = abstract_step.make_abstract_step(config, shape, mesh)
    base = Base("trained", shape, byte_tokenizer(), None)
    definition = make_step_definition(config, base, mesh, step.definition.objective)
    split = definition.trainable
    frozen = meshes.abstract_arrays(split.frozen_specs, mesh, split.frozen_dtype)
    rows = config.data.batch_size, config.data.seq_len
    ids, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    passes = config.data.batch_size // config.data.rows_per_pass
    batch = meshes.to_global(Batch(ids, ids, weights, ids, ids, ids), mesh, passes)
    trained = train_step.jit_train_step(definition).lower(
        train_step.abstract_state(definition), frozen, batch
    )
    assert compile_step.lower(step).as_text() == trained.as_text()


@pytest.mark.soak
def test_the_planner_finds_the_shape_of_the_default_model(smollm2):
    """It reads no weights; the parser of the file's description takes seconds."""
    assert abstract_step.find_architecture(Config(), "") == smollm2.architecture


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_slice_a_shipped_config_names_exists_and_takes_its_mesh(file):
    module = importlib.import_module(f"configs.{file.stem}")
    config = from_config_dict(module.get_config())
    if config.runtime.topology:
        target = parse_topology(config.runtime.topology, config.runtime.slices)
        assert meshes.make_mesh(config.mesh, target.devices()).size == target.count


@pytest.mark.parametrize(
    "topology, slices, mesh",
    [
        ("v6e:4x4", 1, MeshConfig(1, 1, 2, 2, 4)),
        ("v5e:4x4", 2, MeshConfig(2, 1, 8, 2)),
        ("v5p:4x4x4", 1, MeshConfig(16, 1, 4)),
        ("v5p:4x4x4", 2, MeshConfig(2, 4, 4, 2, 2)),
        ("v5e:4x4", 2, MeshConfig(4, 1, 8)),
    ],
    ids=str,
)
def test_axes_of_any_size_lie_on_a_torus(topology, slices, mesh):
    """Each device once; and where there are several slices, no replica on two."""
    target = parse_topology(topology, slices)
    laid = meshes.make_mesh(mesh, target.devices()).devices
    assert sorted(device.id for device in laid.flat) == list(range(target.count))
    if slices > 1:
        for replica in laid:
            assert len({device.slice_index for device in replica.flat}) == 1


def test_devices_of_a_target_make_the_meshes_of_training():
    """Stand-ins and real devices alike: the same sizes from the same config."""
    target = parse_device("h100:8")
    sizes = MeshConfig(data=2, fsdp=2, tensor=2)
    planned = meshes.make_mesh(sizes, target.devices())
    assert planned.shape == meshes.make_mesh(sizes, jax.devices()).shape
