"""Plans of models with experts: all of them in memory, and a token's own in FLOPs."""

import dataclasses
import types

import pytest
from plan_helpers import ONE_B, big_config

from research.config.run_config import MeshConfig
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.plan import abstract_step, layout_search, planner
from research.plan.planned_devices import parse_device
from research.train import doctor
from research.train.metrics import throughput

QWEN = PRESETS["qwen3-30b-a3b"]
MESH = MeshConfig(data=1, fsdp=4, tensor=2, expert=8)
TARGET = parse_device("v5p:4x4x4")


def plan(kind="full", mesh=MESH, **changes):
    return planner.plan_estimate(
        dataclasses.replace(big_config(kind, mesh=mesh), **changes), QWEN, TARGET
    )


def test_the_published_model_has_30_billion_parameters_of_which_3_are_used():
    model = Model(QWEN)
    assert throughput.count_used(model.specs, model) == pytest.approx(3.35e9, rel=0.01)
    assert plan().trained == pytest.approx(30.5e9, rel=0.01)


def test_flops_are_those_of_the_used_matrices():
    """Six for each, 48 layers of attention and 8 experts, and two of the head twice."""
    tokens, length = 64 * 2048, 2048
    attention = 2 * 2048 * (32 + 4) * 128
    experts = 8 * 3 * 2048 * 768 + 2048 * 128
    scores = 12 * 48 * 32 * 128 * (length + 1) / 2
    used = 6 * (48 * (attention + experts) + 151936 * 2048)
    assert plan().flops.model == pytest.approx(tokens * (used + scores), rel=1e-3)


def test_a_token_trains_only_the_adapters_of_its_experts():
    config = big_config("lora", mesh=MESH)
    lora = dataclasses.replace(config.lora, rank=4, targets=("mlp.up",))
    found, other = (
        plan("lora", lora=dataclasses.replace(lora, rank=rank)) for rank in (4, 8)
    )
    assert found.trained == 48 * 128 * 4 * (2048 + 768)
    more = other.flops.model - found.flops.model
    assert more == pytest.approx(6 * found.trained / 16 * 64 * 2048)


def test_each_chip_holds_its_part_of_the_experts_and_of_all_else():
    found = plan()
    # Four bytes of each; the router's 128 columns and the norms are small.
    assert found.memory.trained == pytest.approx(4 * 30.5e9 / 64, rel=0.01)
    kinds = {(row.kind, row.axes) for row in found.traffic}
    assert {
        ("all-gather", "expert"), ("reduce-scatter", "expert"),
        ("all-gather", "fsdp"), ("reduce-scatter", "fsdp"),
        ("all-gather", "fsdp*expert"), ("reduce-scatter", "fsdp*expert"),
        ("all-reduce", "tensor"),
    } <= kinds  # fmt: skip
    # A device gathers an eighth of a layer's experts, and computes them once more.
    alone = plan(mesh=MeshConfig(data=1, fsdp=32, tensor=2))
    assert alone.memory.temporaries > found.memory.temporaries
    again = [
        plan(mesh=mesh, model=dataclasses.replace(big_config().model, remat="none"))
        for mesh in (MESH, alone.config.mesh)
    ]
    forward = 2 * 48 * 8 * 3 * 2048 * 768 * 64 * 2048
    less = again[0].flops.recomputed - again[1].flops.recomputed
    assert less == pytest.approx(forward, rel=1e-3)


def test_a_search_splits_experts_where_there_are_any():
    config = big_config()
    assert {x.expert for x in layout_search.layouts(config, TARGET)} == {1}
    found = [*layout_search.layouts(config, TARGET, QWEN.experts.count)]
    assert {x.expert for x in found} >= {1, 2, 4, 8, 16, 32, 64}
    for sizes in found:
        mesh = meshes.make_mesh(sizes, TARGET.devices())
        assert sizes.expert == 1 or 128 % (sizes.expert * sizes.tensor) == 0
        assert mesh.size == 64


@pytest.mark.parametrize("shape, used", [(QWEN, True), (ONE_B, False)])
def test_the_doctor_says_how_many_parameters_a_token_uses(shape, used):
    mesh = MeshConfig(data=1, fsdp=32, tensor=2)
    devices = meshes.make_mesh(mesh, TARGET.devices())
    step = abstract_step.make_abstract_step(big_config(mesh=mesh), shape, devices)
    tokenizer = types.SimpleNamespace(vocab_size=5, fingerprint="0" * 64)
    base = types.SimpleNamespace(name="m", fingerprint="1" * 64, tokenizer=tokenizer)
    findings = doctor.examine_model(base, step.definition, step.state, step.frozen)
    [found] = [x for x in findings if x.name == "parameters"]
    assert ("a token uses 3,3" in found.text) == used
    assert (found.numbers["used"] < found.numbers["trained"]) == used
