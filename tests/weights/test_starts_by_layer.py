"""Starts that decompose matrices hold one of them in float32, and train everywhere."""

import dataclasses
import math
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, mesh_sizes
from small_run import make_small_place, small_config

from research.config.run_config import LoRAConfig
from research.formats.base_model import open_base
from research.formats.load_parameters import load_frozen
from research.models.presets import preset
from research.parallel import mesh as meshes
from research.plan.abstract_step import device_bytes, make_abstract_step
from research.plan.estimate.memory_formulas import peaks_between_steps
from research.tasks import task_registry
from research.train.step import definition_from_config
from research.train.step.definition_from_config import (
    load_start,
    make_step_definition,
)
from research.weights.adapters.adapter_registry import find_kind
from research.weights.parameter_spec import Spec
from research.weights.quantized import nf4_weights
from research.weights.representations.lost_in_codes import LostInCodes

LAYERS, SIZE = 24, 128
SPEC = Spec((LAYERS, SIZE, SIZE), ("layers", "embed", "mlp"), stacked=1)
CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=("w",))


@pytest.mark.parametrize("kind", ["loftq", "pissa", "olora"])
def test_a_start_over_codes_makes_one_matrix_at_a_time(kind):
    kind, weight = find_kind(kind), jnp.zeros(SPEC.shape, jnp.bfloat16)
    base = jax.eval_shape(lambda w: nf4_weights.FORMAT.store(w, SPEC), weight)
    base = LostInCodes(weight, base) if kind.reads_lost else base

    def start(key, base):
        return kind.init(key, {"w": SPEC}, CONFIG, {"w": base})

    compiled = jax.jit(start).lower(jax.random.key(0), base).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert 4 * SIZE**2 <= held < 12 * 4 * SIZE**2 < 4 * SIZE**2 * LAYERS


def test_a_direction_that_lost_nothing_starts_as_plain_lora():
    spec = Spec((3, 8, 6), ("layers", "embed", "mlp"), stacked=1)
    weight = np.float32(np.random.default_rng(0).normal(size=spec.shape))
    codes = weight.copy()
    codes[0] = np.round(codes[0])
    codes[1, 0] += 0.5  # One direction of three.
    key, lost = jax.random.key(0), LostInCodes(jnp.array(weight), jnp.array(codes))
    found, plain = (
        find_kind(kind).init(key, {"w": spec}, CONFIG, {"w": lost})["w"]
        for kind in ("loftq", "lora")
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2], y[2]), found, plain)
    update = 2.0 * np.matmul(found["a"], found["b"])
    close(update[1:], (weight - codes)[1:], 1e-5)
    left = np.linalg.norm((weight - codes - update)[0])
    assert left < 0.8 * np.linalg.norm((weight - codes)[0])
    # Each pair of a column and a row gets a gradient.
    for a, b in zip(found["a"], found["b"], strict=True):
        assert (np.abs(a).max(0) + np.abs(b).max(1) > 1e-3).all()


def test_a_fault_of_reading_is_no_absent_path(monkeypatch):
    def read(definition, base, path, codes):
        raise KeyError(f"{path} is not in the file")

    monkeypatch.setattr(definition_from_config, "lost_in_codes", read)
    definition = SimpleNamespace(trainable=SimpleNamespace(full=frozenset()))
    lost = definition_from_config._LostByPath(definition, None, {"w": 0})
    with pytest.raises(KeyError, match="w is not in the file"):
        find_kind("loftq").init(jax.random.key(0), {"w": SPEC}, CONFIG, lost)
    assert lost.get("v") is None


def test_loftq_reads_one_path_at_a_time_and_the_plan_knows(tmp_path, monkeypatch):
    make_small_place(tmp_path)
    lora = LoRAConfig(kind="loftq", rank=2, targets=("mlp",))
    config = small_config(tmp_path, "run", 4, {"quantize": "nf4"}, lora=lora)
    base, mesh = open_base(config.model.init_from), meshes.make_mesh(config.mesh)
    objective = task_registry.make_objective(config, mesh)
    definition = make_step_definition(config, base, mesh, objective)
    frozen = load_frozen(base, definition.model, mesh, definition.trainable, 0)
    device = mesh.devices.flat[0]

    # Arrays of other tests stay out. Shards themselves would be further live arrays.
    others = jax.live_arrays()
    known = {id(array) for array in others}

    def held():
        shapes = [
            (x.sharding.shard_shape(x.shape), x.dtype.itemsize)
            for x in jax.live_arrays()
            if id(x) not in known and device in x.sharding.device_set
        ]
        return sum(math.prod(shape) * size for shape, size in shapes)

    read, found, weights = definition_from_config.lost_in_codes, {}, []

    def reading(*given):
        assert all(weight() is None for weight in weights), "the path before is gone"
        lost = read(*given)
        found[given[2]] = held()
        weights.append(weakref.ref(lost.weight))
        return lost

    monkeypatch.setattr(definition_from_config, "lost_in_codes", reading)
    load_start(definition, base, frozen, None, list)
    assert found.keys() == definition.trainable.specs.keys()
    step = make_abstract_step(config, base.architecture, mesh)
    planned = peaks_between_steps(step)["start"] - device_bytes(step.frozen)
    assert 0 < max(found.values()) < planned
    # An 8B model: its largest path, and a few copies of one matrix.
    config = dataclasses.replace(config, mesh=mesh_sizes(data=1))
    alone = meshes.make_mesh(config.mesh, jax.devices()[:1])
    large = make_abstract_step(config, preset("llama3.1-8b"), alone)
    beside = peaks_between_steps(large)["start"] - device_bytes(large.frozen)
    stack = 4 * 32 * 4096 * 14336  # Float32, as the model of `config`.
    assert stack < beside < 1.4 * stack
