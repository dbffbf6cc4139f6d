"""Another mesh resumes from what one mesh has saved, byte for byte."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest
from helpers import TINY, in_soak
from step_definitions import make_definition, spread

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import CheckpointConfig
from research.models.architecture import Experts
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.train.step import train_step

# data, fsdp, tensor, replica, context. Each mesh saves and each restores once; all
# other pairs are in the soak.
PAIRS = [
    ((1, 8, 1), (1, 1, 1)),
    ((1, 1, 1), (8, 1, 1)),
    ((4, 1, 2), (2, 2, 2)),
    ((1, 2, 4), (1, 2, 1, 2, 2)),
    ((1, 8, 1), (2, 1, 2)),
    ((4, 1, 2), (1, 4, 1)),
    ((1, 2, 4), (1, 1, 2)),
]
MORE_PAIRS = [
    pair
    for pair in itertools.product(*(dict.fromkeys(x) for x in zip(*PAIRS, strict=True)))
    if pair not in PAIRS
]


@pytest.fixture(scope="module")
def on_mesh(model):
    """`on_mesh(kind, sizes)`: a definition, and the shapes of its state there."""

    @functools.cache
    def job_of(kind, sizes):
        definition, _ = make_definition(model, kind, sizes)
        return definition, train_step.abstract_state(definition)

    return job_of


@pytest.fixture(scope="module")
def checkpoints(on_mesh, tmp_path_factory):
    """`checkpoints(kind, sizes)`: a state of random values, saved from there."""

    @functools.cache
    def save(kind, sizes):
        folder = tmp_path_factory.mktemp("saved")
        _, abstract = on_mesh(kind, sizes)
        values = random_values(abstract)
        state = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding), values, abstract
        )
        with Checkpointer(folder, CheckpointConfig(), {}) as checkpointer:
            checkpointer.save(3, state, {"data": 1}, None)
        return folder

    return save


def random_values(abstract):
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda leaf: np.asarray(0.05 * rng.normal(size=leaf.shape), leaf.dtype),
        abstract,
    )


def restore(folder, abstract):
    with Checkpointer(folder, CheckpointConfig(), {}, read_only=True) as checkpointer:
        return checkpointer.restore(abstract).state


@pytest.mark.parametrize(
    "source, target", [*PAIRS, *(in_soak(*pair) for pair in MORE_PAIRS)], ids=str
)
@pytest.mark.parametrize("kind", ["full", in_soak("lora")])
def test_parameters_and_optimizer_come_back(on_mesh, checkpoints, kind, source, target):
    _, abstract = on_mesh(kind, target)
    found = restore(checkpoints(kind, source), abstract)
    expected = random_values(abstract)
    leaves = (jax.tree.leaves(tree) for tree in (found, expected, abstract))
    for new, old, leaf in zip(*leaves, strict=True):
        assert np.asarray(new).tobytes() == old.tobytes()
        assert new.sharding == leaf.sharding
        assert len(new.sharding.device_set) == math.prod(target)


def test_experts_come_back_on_another_split(tmp_path):
    experts = Experts(count=8, chosen=2)
    model = Model(dataclasses.replace(TINY, mlp=24, experts=experts))

    def state_on(sizes):
        definition, _ = make_definition(model, "full", sizes)
        return train_step.abstract_state(definition)

    source, *targets = map(
        state_on,
        [(1, 2, 2, 1, 1, 2), (1, 1, 1, 1, 1, 8), (1, 2, 1, 1, 2, 2), (1, 1, 1)],
    )
    values = random_values(source)
    state = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), values, source)
    with Checkpointer(tmp_path, CheckpointConfig(), {}) as checkpointer:
        checkpointer.save(3, state, {"data": 1}, None)
    parts = set()
    for abstract in targets:
        found = restore(tmp_path, abstract)
        jax.tree.map(np.testing.assert_array_equal, found, values)
        up = found.params["layers.mlp.up.kernel"]
        assert up.sharding == abstract.params["layers.mlp.up.kernel"].sharding
        parts.add(up.sharding.shard_shape(up.shape)[1])
    assert parts == {1, 4, 8}


@pytest.fixture(scope="module")
def loss_after(on_mesh, checkpoints, params, batch):
    """`loss_after(kind, source, target)`: of a batch, by the restored parameters."""

    @functools.cache
    def loss(kind, source, target):
        definition, abstract = on_mesh(kind, target)
        state = restore(checkpoints(kind, source), abstract)
        frozen = (
            spread(params, definition.model.specs, definition.mesh)
            if kind == "lora"
            else {}
        )
        sums = train_step.jit_eval_step(definition)(
            state.params, frozen, meshes.to_global(batch, definition.mesh)
        )
        loss = sums["loss"]
        return float(loss.numerator.sum() / loss.denominator.sum())

    return loss


@pytest.mark.parametrize(
    "target",
    [
        (2, 1, 2),
        *map(in_soak, [(8, 1, 1), (1, 4, 1), (1, 1, 2), (2, 2, 2), (1, 2, 1, 2, 2)]),
    ],
    ids=str,
)
def test_the_next_loss_is_the_same(loss_after, target):
    expected = loss_after("full", (1, 1, 1), (1, 1, 1))
    assert loss_after("full", (1, 8, 1), target) == pytest.approx(expected, rel=1e-6)


@pytest.mark.soak
def test_the_next_loss_of_adapters_is_the_same(loss_after):
    expected = loss_after("lora", (1, 1, 1), (1, 1, 1))
    found = loss_after("lora", (1, 8, 1), (2, 2, 2))
    assert found == pytest.approx(expected, rel=1e-6)
