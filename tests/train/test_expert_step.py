"""A step of a model with experts means the same on every mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import TINY, close, random_adapters, random_params
from step_definitions import ONE, make_definition, spread

from research.models.architecture import Experts
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.train.step import train_step

MIXED = dataclasses.replace(
    TINY, mlp=24, experts=Experts(count=8, chosen=2, balance_weight=0.5)
)


@pytest.fixture(scope="module")
def trained(batch):
    """`trained(kind, sizes)`: the figures and the state of two steps."""
    model = Model(MIXED)
    params = random_params(model.specs)

    @functools.cache
    def run(kind, sizes):
        definition, _ = make_definition(model, kind, sizes)
        mesh, specs = definition.mesh, definition.trainable.specs
        frozen = spread(params, model.specs, mesh) if kind == "lora" else {}
        start = random_adapters(specs) if kind == "lora" else params
        state = train_step.jit_init(definition)(spread(start, specs, mesh))
        train = train_step.jit_train_step(definition)
        on_mesh = meshes.to_global(batch, mesh, 1)
        first = jax.tree.map(np.asarray, state.params)
        for _ in range(2):
            state, figures = train(state, frozen, on_mesh)
        return first, jax.tree.map(np.asarray, (figures, state))

    return run


# data, fsdp, tensor, replica, context, expert: each is split beside that of experts.
@pytest.mark.soak
@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("lora", (1, 2, 1, 1, 2, 2)),
        ("lora", (1, 1, 2, 1, 1, 4)),
        ("full", (1, 2, 2, 1, 1, 2)),
        ("full", (2, 1, 1, 1, 2, 2)),
    ],
    ids=str,
)
def test_every_mesh_trains_experts_as_one_device(trained, kind, sizes):
    first, found = trained(kind, sizes)
    _, expected = trained(kind, ONE)
    close(found, expected)
    figures, state = found
    loads = [x for name, x in figures["means"].items() if "expert_load" in name]
    assert len(loads) == 8 and sum(loads) == pytest.approx(1)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-4
