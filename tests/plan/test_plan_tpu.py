"""The TPU compiler accepts every shipped config: `make plan-check`.

Needs libtpu, which announces itself at every start of JAX: it lies in a folder of its
own, and nothing else runs with it. Takes about a minute a program.
"""

import dataclasses
import importlib
import importlib.util
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from plan_helpers import EIGHT_B, ONE_B, big_config, preset_of

from launch.jobs.compiler_settings import SETTINGS
from research.config.run_config import MeshConfig, from_config_dict
from research.models.presets import PRESETS
from research.parallel import mesh as meshes
from research.plan import abstract_step, planner
from research.plan.compiled import compile_step, hlo_text
from research.plan.compiled.libtpu_environment import ENVIRONMENT
from research.plan.compiled.schedule import read_schedule, total
from research.plan.planned_devices import parse_topology

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.filterwarnings("default"),
]

ROOT = Path(__file__).parents[2]


def load(name):
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


SHIPPED = [
    file.stem
    for file in sorted((ROOT / "configs").glob("[a-z]*.py"))
    if load(file.stem).runtime.topology
]


@pytest.fixture(scope="module")
def plan():
    """Compile each requested config once."""
    os.environ |= ENVIRONMENT
    made = {}

    def make(key, config, architecture, topology, slices=1):
        if key not in made:
            target = parse_topology(topology, slices)
            devices = compile_step.topology_devices(target)
            arguments = (config, architecture, target)
            made[key] = (
                planner.plan_compiled(*arguments, devices),
                planner.plan_estimate(*arguments),
            )
        return made[key]

    return make


@pytest.fixture(scope="module")
def shipped(plan):
    def make(name):
        config = load(name)
        shape = abstract_step.find_architecture(config, preset_of(config))
        where = config.runtime
        return plan(name, config, shape, where.topology, where.slices)

    return make


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_fits_its_topology(shipped, name):
    made, _ = shipped(name)
    assert made.fits, f"{made.needed / made.target.chip.hbm:.0%} of the memory"
    assert made.memory.total == made.needed


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_sends_what_its_mesh_says(shipped, name):
    """In kinds the compiler may choose; along no other axes, and not much more."""
    made, estimate = shipped(name)
    assert {a for row in made.traffic for a in row.axes.split("*")} <= set(made.mesh)
    for axis in made.mesh:
        sent = sum(row.nbytes for row in made.traffic if axis in row.axes.split("*"))
        expected = sum(row.nbytes for row in estimate.traffic if row.axes == axis)
        assert 0.8 * expected < sent < 1.6 * expected


def test_weights_are_gathered_and_gradients_scattered_on_a_torus_of_three_axes(shipped):
    """Over all three axes, all of this would be sums: twice the bytes on the links."""
    made, _ = shipped("pretrain_8b")
    assert made.target.count == 256
    sent = {row.kind: row.nbytes for row in made.traffic if row.axes == "fsdp"}
    # The gradient of the head is still a sum.
    assert sent["all-gather"] > sent["reduce-scatter"] > sent["all-reduce"]


@pytest.mark.parametrize("name", SHIPPED)
def test_no_parameter_lies_whole_on_a_chip_that_should_hold_a_part(shipped, name):
    made, _ = shipped(name)
    config = load(name)
    shape = abstract_step.find_architecture(config, preset_of(config))
    devices = made.target.devices()
    mesh = meshes.make_mesh(config.mesh, devices)
    step = abstract_step.make_abstract_step(config, shape, mesh)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    # Adapters are small, and split along one of their two sides only.
    split = step.frozen or (step.state.params, step.state.opt_state)
    leaves = jax.tree.leaves(split)
    if config.model.quantize:  # The scales of scales are few, and lie whole.
        leaves = [x for x in leaves if x.dtype != jnp.float32]
    large = [x for x in leaves if math.prod(x.shape) > 1e6]
    assert len(large) >= 9
    for leaf in large:
        here = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert here == math.prod(leaf.shape) / parts
    # The program's own arguments are no larger than these parts.
    memory = made.memory
    arguments = memory.frozen + memory.trained + memory.optimizer + memory.batch
    assert 0 <= memory.padding < 0.2 * arguments


QWEN = PRESETS["qwen3-30b-a3b"]
PAIRS = {
    "30B-A3B full, v5p-64, experts over 8 chips": (
        big_config(rows=64, seq=4096, mesh=MeshConfig(data=1, fsdp=8, expert=8)),
        QWEN,
        "v5p:4x4x4",
    ),
    "135M full, v5e-16, 4 x 4, nothing recomputed": (
        big_config(rows=64, seq=1024, remat="none", mesh=MeshConfig(data=4, fsdp=4)),
        PRESETS["smollm2-135m"],
        "v5e:4x4",
    ),
    "1B full, v5e-16, 2 micro-batches": (
        big_config(rows=64, micro=32, mesh=MeshConfig(data=1, fsdp=16)),
        ONE_B,
        "v5e:4x4",
    ),
    "1B full, v6e-8, dots": (
        big_config(rows=16, remat="dots", mesh=MeshConfig(data=1, fsdp=8)),
        ONE_B,
        "v6e:2x4",
    ),
    "8B LoRA, v5e-16": (
        big_config("lora", rows=16, mesh=MeshConfig(data=1, fsdp=16)),
        EIGHT_B,
        "v5e:4x4",
    ),
    "8B full, v5p-64": (
        big_config(rows=64, seq=8192, mesh=MeshConfig(data=1, fsdp=64)),
        EIGHT_B,
        "v5p:4x4x4",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_estimate_is_within_a_tenth_of_the_compiler(plan, name):
    made, estimate = plan(name, *PAIRS[name])
    print(f"{name}: {made.needed / 2**30:.2f} GiB, {estimate.needed / 2**30:.2f}")
    assert estimate.needed == pytest.approx(made.needed, rel=0.1)


def test_adapters_of_128_experts_fit_sixteen_small_chips(plan):
    """Along `expert` tokens travel, as many as planned, and no matrix does."""
    config = big_config("lora", rows=16, mesh=MeshConfig(data=1, fsdp=2, expert=8))
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=4))
    made, estimate = plan("experts", config, QWEN, "v5e:4x4")
    print(f"{made.needed / 2**30:.2f} GiB, {estimate.needed / 2**30:.2f}")
    assert made.fits and made.source == "compiled"
    assert estimate.needed == pytest.approx(made.needed, rel=0.12)
    met, planned = (
        next(
            x.nbytes for x in p.traffic if (x.kind, x.axes) == ("all-gather", "expert")
        )
        for p in (made, estimate)
    )
    assert met == pytest.approx(planned, rel=0.05)


def test_two_slices_meet_in_the_adapters_alone(plan):
    config = big_config("lora", rows=16, mesh=MeshConfig(2, 1, 4))
    made, estimate = plan("slices", config, ONE_B, "v5e:2x2", 2)
    print(f"{made.needed / 2**30:.2f} GiB, {estimate.needed / 2**30:.2f}")
    assert estimate.needed == pytest.approx(made.needed, rel=0.12)
    between = [row for row in made.traffic if row.axes == "replica"]
    assert [row.kind for row in between] == ["all-reduce"]
    assert 0 < made.roofline.dcn < 2 * estimate.roofline.dcn
    # Adapters of 11 M parameters, not the 1.2 G of the model.
    assert between[0].nbytes < 4 * made.trained


def test_an_offloaded_optimizer_is_not_on_the_chip(plan):
    config = big_config(rows=16, mesh=MeshConfig(data=1, fsdp=4))
    runtime = dataclasses.replace(config.runtime, offload_optimizer=True)
    away = dataclasses.replace(config, runtime=runtime)
    here, _ = plan("here", config, ONE_B, "v5e:2x2")
    there, _ = plan("there", away, ONE_B, "v5e:2x2")
    moments = 2 * there.memory.trained
    assert there.memory.optimizer < 1e6 < moments
    assert there.needed < here.needed - 0.5 * moments


def test_an_oversized_step_is_a_plan_that_does_not_fit(plan):
    """Its arguments alone are 14.8 of 15.75 GB."""
    config = big_config(rows=1, mesh=MeshConfig())
    made, estimate = plan("oversized", config, ONE_B, "v5e:1x1")
    print(f"{made.needed / 2**30:.2f} GiB, {estimate.needed / 2**30:.2f}")
    assert made.memory is None and not made.fits and not estimate.fits
    assert estimate.needed == pytest.approx(made.needed, rel=0.1)
    arguments = 12 * made.trained
    assert arguments < made.needed < 3 * arguments


@pytest.mark.parametrize("topology", ["v6e:8x8", "v5p:4x4x4"])
def test_sparsecores_gather_the_weights_of_a_layer_while_it_computes(topology):
    """The second of two gathers. Without the setting none is hidden on these slices,
    and over three axes of a torus weights are summed."""
    os.environ |= ENVIRONMENT
    devices = compile_step.topology_devices(parse_topology(topology))
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=64), devices)

    def shape(*sizes, axis):
        spec = P(*("fsdp" if i == axis else None for i in range(len(sizes))))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

    x = shape(64, 2048, 2048, axis=0)
    up, down = shape(3, 2048, 8192, axis=1), shape(3, 8192, 2048, axis=2)

    def layers(x, up, down):
        def layer(x, weights):
            whole = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
            return x + jax.nn.silu(x @ whole[0]) @ whole[1], None

        return jax.lax.scan(layer, x, (up, down))[0]

    lowered = jax.jit(layers, out_shardings=x.sharding).lower(x, up, down)
    flags = SETTINGS["tpu-sparsecore-gather"].value.split()
    options = dict(flag.lstrip("-").split("=") for flag in flags)
    weights = 2 * 3 * 2048 * 8192 * 2
    shares = []
    for chosen in (None, options):
        program = hlo_text.parse(lowered.compile(compiler_options=chosen).as_text())
        found = read_schedule(program, mesh, [])
        hidden = [each for each in found.hidden if each.kind == "all-gather"]
        assert total((*found.hidden, *found.bare)) == pytest.approx(weights, rel=0.01)
        shares.append(total(hidden) / weights)
        kinds = {each.kind for each in (*found.hidden, *found.bare)}
        assert kinds == {"all-gather"} or chosen is None
    assert shares[0] == 0 and shares[1] == pytest.approx(0.5)
