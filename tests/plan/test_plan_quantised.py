"""A frozen base in codes is planned in the bytes that devices hold of it."""

import importlib

import jax
import pytest
from helpers import mesh_sizes
from small_run import make_small_place, small_config

from research.config.run_config import from_config_dict
from research.formats.base_model import open_base
from research.formats.load_parameters import load_frozen
from research.models.presets import preset
from research.parallel import mesh as meshes
from research.plan import abstract_step, planner
from research.plan.planned_devices import parse_device
from research.weights import parameter_paths

GIB = 2**30


@pytest.mark.parametrize(
    "file, shape, device, knobs, frozen",
    [
        ("finetune_8b_qlora", "llama3.1-8b", "24GB", {}, (4.3, 4.4)),
        ("finetune_70b_qlora", "llama3.1-70b", "v5e:4x4", {}, (2.2, 2.3)),
        (
            "finetune_70b_qlora",
            "llama3.1-70b",
            "h100",
            {"data.microbatch_size": 1},
            (34.8, 34.9),
        ),
    ],
)
def test_the_shipped_configs_fit_the_chips_they_name(
    file, shape, device, knobs, frozen
):
    values = importlib.import_module(f"configs.{file}").get_config()
    values.update_from_flattened_dict(knobs)
    config, target = from_config_dict(values), parse_device(device)
    plan = planner.plan_estimate(config, preset(shape), target)
    assert plan.fits
    low, high = frozen
    assert low < plan.memory.frozen / GIB < high
    assert [*plan.frozen_forms] == ["nf4", "int8", "bfloat16"]
    assert sum(plan.frozen_forms.values()) == plan.memory.frozen
    values.model.quantize = "none"
    plain = planner.plan_estimate(from_config_dict(values), preset(shape), target)
    assert 0.26 < plan.memory.frozen / plain.memory.frozen < 0.3
    assert plain.fits is (shape == "llama3.1-8b")


def test_planned_bytes_are_those_of_the_loaded_arrays(tmp_path):
    make_small_place(tmp_path)
    model = {"quantize": "nf4", "quantize_paths": ("down_proj=int8", "key=none")}
    config = small_config(tmp_path, "planned", 4, model)
    base = open_base(config.model.init_from)
    mesh = meshes.make_mesh(mesh_sizes(data=2, fsdp=2, tensor=2))
    step = abstract_step.make_abstract_step(config, base.architecture, mesh)
    split = step.definition.trainable
    frozen = load_frozen(base, step.definition.model, mesh, split, 0)
    for found, planned in zip(
        *map(jax.tree.leaves, (frozen, step.frozen)), strict=True
    ):
        assert (found.shape, found.dtype) == (planned.shape, planned.dtype)
        assert found.sharding == planned.sharding
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(frozen)]
    assert sum(held) == abstract_step.device_bytes(step.frozen)
    forms = parameter_paths.bytes_by_form(frozen)
    assert sum(forms.values()) == parameter_paths.nbytes(frozen)
    assert sorted(forms) == ["float32", "int8", "nf4"]
    down = jax.tree.leaves(frozen["layers.mlp.down.kernel"])
    key = frozen["layers.attention.key.kernel"]
    assert forms["int8"] > parameter_paths.nbytes(down)
    assert forms["float32"] > parameter_paths.nbytes(key)
