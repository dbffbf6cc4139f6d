"""The programs of the engine, compiled for TPUs that are not here: `make plan-check`.

Needs libtpu, as `tests/plan/test_plan_tpu.py` does.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest

from research.config.knob_groups import MeshConfig
from research.engine.slot_decoder import SlotDecoder
from research.models.presets import PRESETS
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.plan.compiled import compile_step
from research.plan.compiled.libtpu_environment import ENVIRONMENT
from research.plan.planned_devices import parse_topology

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.filterwarnings("default"),
]

SLOTS, LENGTH = 32, 4000
MOVED = re.compile(r"= (?:bf16|f32)\[([\d,]+)\]\S* (?:copy|all-gather)[\w-]*\(")


@pytest.mark.parametrize("tensor", [1, 4])
def test_decoding_reads_pages_and_moves_neither_cache_nor_head(tensor):
    """Two layers of an 8B, whose head is larger than the cache of a chip."""
    os.environ |= ENVIRONMENT
    devices = compile_step.topology_devices(parse_topology("v5e:2x2", 1))[:tensor]
    mesh = meshes.make_mesh(MeshConfig(fsdp=1, tensor=tensor), devices)
    shape = dataclasses.replace(PRESETS["llama3.1-8b"], layers=2)
    model = Model(shape, Options(dtype=jnp.bfloat16))
    decoder = SlotDecoder(model, None, SLOTS, LENGTH, mesh=mesh)
    where = meshes.shardings(model.specs, mesh)
    params = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=where[path])
        for path, spec in model.specs.items()
    }
    empty = decoder._empty
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(empty),
        empty.lower().compile().output_shardings,
    )
    program = decoder._decode.lower(params, state).compile().as_text()
    assert "paged_attention" in program
    moved = [math.prod(map(int, found.split(","))) for found in MOVED.findall(program)]
    assert max(moved) < state.k.size / tensor
