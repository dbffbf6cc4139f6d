"""The programs of the engine, compiled for TPUs that are not here: `make plan-check`.

Needs libtpu, as `tests/plan/test_plan_tpu.py` does.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax.numpy as jnp
import pytest
from abstract_slots import abstract_state

from research.config.knob_groups import MeshConfig
from research.engine.slot_decoder import ACCELERATOR_ROUNDS, SlotDecoder
from research.models.presets import PRESETS
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.plan.compiled import collectives, compile_step, hlo_text
from research.plan.compiled.libtpu_environment import ENVIRONMENT
from research.plan.compiled.schedule import read_schedule
from research.plan.planned_devices import parse_topology

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.filterwarnings("default"),
]

SLOTS, LENGTH, ROUNDS = 32, 4000, ACCELERATOR_ROUNDS
MOVED = re.compile(r"= (?:bf16|f32)\[([\d,]+)\]\S* (?:copy|all-gather)[\w-]*\(")


def compiled_decode(**sizes):
    """Two layers of an 8B; the program, its mesh, and the abstract state."""
    os.environ |= ENVIRONMENT
    count = math.prod(sizes.values())
    devices = compile_step.topology_devices(parse_topology("v5e:2x2", 1))[:count]
    mesh = meshes.make_mesh(MeshConfig(**{"data": 1} | sizes), devices)
    shape = dataclasses.replace(PRESETS["llama3.1-8b"], layers=2)
    model = Model(shape, Options(dtype=jnp.bfloat16))
    decoder = SlotDecoder(model, None, SLOTS, LENGTH, mesh=mesh)
    params = meshes.abstract_arrays(model.specs, mesh, jnp.bfloat16)
    state = abstract_state(decoder)
    return decoder._decode.lower(params, state).compile().as_text(), mesh, state


@pytest.mark.parametrize("tensor", [1, 4])
def test_decoding_reads_pages_and_moves_neither_cache_nor_head(tensor):
    """The head of an 8B is larger than the cache of a chip."""
    program, _, state = compiled_decode(tensor=tensor)
    assert "paged_attention" in program
    moved = [math.prod(map(int, found.split(","))) for found in MOVED.findall(program)]
    assert max(moved) < state.k.size / tensor


def test_a_round_sends_no_more_than_the_logits_of_a_chip():
    """Not the logits or the counts of all slots, to chips that have other slots."""
    program, mesh, state = compiled_decode(data=2, tensor=2)
    found = read_schedule(hlo_text.parse(program), mesh, [])
    sent = [each.nbytes for each in (*found.bare, *found.hidden)]
    counts = state.rows.choice.counts
    assert len(sent) > 4 and max(sent) <= 4 * counts.size / mesh.size


def test_a_call_gathers_the_head_once_and_not_in_each_round():
    """It is larger than all else that decoding sends."""
    program, mesh, _ = compiled_decode(fsdp=2, tensor=2)
    found = collectives.find_collectives(hlo_text.parse(program), mesh, ROUNDS)
    shape = PRESETS["llama3.1-8b"]
    head = 2 * shape.embed * shape.vocab // 2
    sent = [(each.kind, each.times) for each in found if each.nbytes >= head]
    assert sent == [("all-gather", 1)]
