"""A step means the same on every mesh, in every split of the batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak, mesh_sizes, random_adapters
from step_definitions import ONE, OneLogitStep, make_definition, spread

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import CheckpointConfig
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.train.step import train_step


@pytest.fixture
def run(five_steps):
    return five_steps


def assert_same_training(found, expected):
    close(found.metrics, expected.metrics)
    close(found.state, expected.state)


# data, fsdp, tensor, replica, context; and microbatches. Each axis is split once here;
# with the soak, each pair of axes is.
MESHES = [
    ("full", (1, 2, 4), 1),
    ("full", (2, 1, 1, 2, 2), 2),
    ("lora", (1, 2, 4), 1),
]
MORE_MESHES = [
    ("full", (1, 1, 2, 1, 4), 2),
    ("full", (1, 1, 2, 2, 2), 1),
    ("full", (1, 2, 1, 2, 2), 1),
    ("full", (1, 8, 1), 1),
    ("full", (2, 2, 2), 2),
    ("lora", (2, 2, 2), 2),
]


@pytest.mark.parametrize(
    "kind, sizes, microbatches",
    [*MESHES, *(in_soak(*case) for case in MORE_MESHES)],
    ids=str,
)
def test_every_mesh_trains_as_one_device(run, kind, sizes, microbatches):
    assert_same_training(run(kind, sizes, microbatches), run(kind))


@pytest.mark.soak
def test_splitting_the_batch_changes_nothing(run):
    """The rows' weights are uneven: a mean of means would differ."""
    assert_same_training(run("lora", ONE, 4), run("lora"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_moves_what_it_should(run, params, kind):
    found = run(kind)
    losses = [metrics["means"]["loss"] for metrics in found.metrics]
    assert losses[2] < losses[1] < losses[0]
    assert int(found.state.step) == 5
    start = (
        params if kind == "full" else random_adapters(found.definition.trainable.specs)
    )
    for before, after in zip(
        jax.tree.leaves(start), jax.tree.leaves(found.state.params), strict=True
    ):
        assert np.abs(before - after).max() > 1e-4


@pytest.fixture(scope="module")
def token_losses(model, params, batch):
    """From logits of everything, without any of the loss module."""

    @jax.jit
    def logits_of(params):
        hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
        return model.logits(params, hidden)

    logits = np.array(logits_of(params), np.float64)
    picked = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - picked


def test_metrics_are_what_their_names_say(run, batch, token_losses):
    found = run("full").metrics[0]
    assert found["weight"] == batch.weights.sum()
    assert found["tokens"] == (batch.segments != 0).sum()
    plain = (token_losses * batch.weights).sum()
    mean = plain / batch.weights.sum()
    np.testing.assert_allclose(found["means"]["loss"], mean, rtol=1e-5)
    loss, counted = found["sums"]["loss"]
    np.testing.assert_allclose(loss.sum(), plain, rtol=1e-5)
    for group in range(4):
        inside = batch.weights[batch.groups == group].sum()
        assert counted[group] == inside


def test_eval_sums_each_group_once(model, params, batch, token_losses):
    shares = np.random.default_rng(0).uniform(0.5, 1.0, batch.weights.shape)
    batch = dataclasses.replace(batch, weights=np.float32(batch.weights * shares))
    definition, _ = make_definition(model, "full", (2, 2, 2))
    placed = spread(params, model.specs, definition.mesh)
    evaluate = train_step.jit_eval_step(definition)
    found = evaluate(placed, {}, meshes.to_global(batch, definition.mesh))["loss"]
    plain = token_losses * batch.weights
    for group in range(4):
        inside = batch.groups == group
        loss, weight = plain[inside].sum(), batch.weights[inside].sum()
        np.testing.assert_allclose(found.numerator[group], loss, rtol=1e-5)
        np.testing.assert_allclose(found.denominator[group], weight, rtol=1e-5)
        assert (weight > 0) == (group < 3)


@pytest.mark.parametrize("field", ["tokens", "targets", "segments", "weights"])
def test_the_hash_of_a_batch_sees_each_value(field):
    """At every place: a product modulo 2**32 loses what ends in zeros."""
    shape = (1, 2, 520)
    ids, ones = np.ones(shape, np.int32), np.ones(shape, np.float32)
    batch = Batch(ids, ids, ones, ids, ids, ids)
    hash_batch = jax.jit(train_step.hash_batch)
    seen = {int(hash_batch(batch))}
    places = [*range(0, 1040, 64), 512, 1039]
    for place in dict.fromkeys(places):
        values = np.array(getattr(batch, field))
        values.flat[place] = 0
        seen.add(int(hash_batch(dataclasses.replace(batch, **{field: values}))))
    assert len(seen) == 1 + len(dict.fromkeys(places))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_is_traced_and_compiled_once(run, kind):
    found = run(kind, (1, 2, 4))
    assert found.traces[0] == found.traces[2] > 0
    assert found.compiled == 1


def test_state_is_donated_and_frozen_is_kept(run, params):
    found = run("lora", (1, 2, 4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(found.first))
    assert found.frozen.keys() == params.keys()
    for path, leaf in found.frozen.items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


def test_a_lora_state_holds_adapters_and_their_moments_only(run):
    found = run("lora")
    adapters = sum(x.size for x in jax.tree.leaves(found.state.params))
    whole = sum(x.size for x in jax.tree.leaves(found.state))
    counters = sum(x.size == 1 for x in jax.tree.leaves(found.state))
    assert whole == 3 * adapters + counters


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_state_stays_where_it_was_put(run, kind):
    """Moments lie as their parameters, before and after a step."""
    found = run(kind, (1, 2, 4))
    wanted = train_step.abstract_state(found.definition)
    for leaf, abstract in zip(
        jax.tree.leaves(found.state), jax.tree.leaves(wanted), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    parts = {
        leaf.shape: leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(found.state.params)
    }
    for leaf in jax.tree.leaves(found.state.opt_state):
        if leaf.ndim:
            assert leaf.sharding.shard_shape(leaf.shape) == parts[leaf.shape]


def test_fsdp_leaves_no_matrix_whole(run, model):
    eight = meshes.shardings(model.specs, meshes.make_mesh(mesh_sizes(1, 8, 1)))
    held = [(p, eight[p], spec.shape) for p, spec in model.specs.items()]
    frozen = run("lora", (1, 2, 4)).frozen
    held += [(path, leaf.sharding, leaf.shape) for path, leaf in frozen.items()]
    for path, sharding, shape in held:
        share = math.prod(sharding.shard_shape(shape)) / math.prod(shape)
        assert share == (1.0 if "norm" in path else 1 / 8), path


def test_an_offloaded_optimizer_lies_on_the_host_and_trains_the_same(run):
    found, plain = run("full", (1, 2, 4), offload=True), run("full", (1, 2, 4))
    assert_same_training(found, plain)
    for leaf in jax.tree.leaves((found.first.opt_state, found.state.opt_state)):
        on_host = leaf.sharding.memory_kind == meshes.HOST_MEMORY
        assert on_host == (leaf.ndim > 0)
    params = jax.tree.leaves(found.state.params)
    assert meshes.HOST_MEMORY not in {leaf.sharding.memory_kind for leaf in params}


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_to_either_memory(run, tmp_path, before, after):
    """Byte for byte, whichever memory it came from."""
    found = run("full", (1, 2, 4), offload=before)
    wanted = train_step.abstract_state(
        dataclasses.replace(found.definition, offload=after)
    )
    with Checkpointer(tmp_path, CheckpointConfig(), {}) as checkpointer:
        checkpointer.save(5, found.state, {}, None)
    with Checkpointer(tmp_path, CheckpointConfig(), {}) as checkpointer:
        restored = checkpointer.restore(wanted).state
    for old, new, abstract in zip(
        *map(jax.tree.leaves, (found.state, restored, wanted)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
        assert new.sharding.memory_kind == abstract.sharding.memory_kind


def test_dropout_differs_by_step_and_microbatch_and_is_off_in_evaluation():
    def forward(params, frozen, key):
        return {"noise": jnp.zeros(()) if key is None else jax.random.uniform(key)}

    step = OneLogitStep(
        forward, lambda weights, ids: jnp.full(ids.shape, weights["noise"])
    )
    seen = {step.loss(steps, part) for steps in (0, 1) for part in (0, 1)}
    assert len(seen) == 4
    assert step.loss(1, 1) in seen
    np.testing.assert_allclose(step.held_out(), np.log(2.0), rtol=1e-6)
