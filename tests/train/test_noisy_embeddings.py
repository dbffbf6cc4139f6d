"""NEFTune: noise on embeddings in training, and nowhere else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_definitions import ONE, OneLogitStep, make_definition, spread

from research.parallel import mesh as meshes
from research.train.step import train_step
from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.representations.noisy_table import NoisyTable, noise_bounds

ALPHA = 5.0


def test_the_bound_of_a_token_follows_the_length_of_its_document():
    packed = np.int32([[1, 1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 3, 3, 3]])
    found = np.asarray(noise_bounds(packed, ALPHA, 16))
    length = np.float32([[4, 4, 4, 4, 2, 2, 1, 1], [1, 4, 4, 4, 4, 3, 3, 3]])
    expected = np.where(packed > 0, ALPHA / np.sqrt(length * 16), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # As transformers, where one document fills the row.
    whole = noise_bounds(np.ones((1, 8), np.int32), ALPHA, 16)
    np.testing.assert_allclose(whole, ALPHA / (8 * 16) ** 0.5, rtol=1e-6)


def test_rows_are_noisy_within_the_bound_and_a_tied_head_is_not():
    rng = np.random.default_rng(0)
    table, ids = jnp.float32(rng.normal(size=(32, 64))), rng.integers(0, 32, (2, 8))
    bound = noise_bounds(np.int32([[1] * 6 + [0] * 2, [1] * 4 + [2] * 4]), ALPHA, 64)
    noisy = NoisyTable(table, jax.random.key(3), bound)
    noise = np.asarray(lookup(noisy, ids, jnp.float32) - table[ids])
    share = noise[0, :6] / np.asarray(bound)[0, :6, None]
    assert np.abs(share).max() <= 1 + 1e-5 and np.abs(share).max() > 0.95
    np.testing.assert_allclose([share.mean(), share.std()], [0, 3**-0.5], atol=0.06)
    assert (noise[0, 6:] == 0).all() and len(np.unique(noise[1])) > 400
    x = jnp.float32(rng.normal(size=(3, 64)))
    np.testing.assert_array_equal(
        contract(x, transpose(noisy)), contract(x, transpose(table))
    )
    np.testing.assert_array_equal(materialize(noisy), table)
    with pytest.raises(ValueError, match=r"\(2, 8\) and ids \(1, 8\)"):
        lookup(noisy, ids[:1], jnp.float32)


def test_noise_differs_by_step_and_microbatch_and_is_off_in_evaluation():
    def read(weights, ids):
        return jnp.sum(lookup(weights[train_step.TABLE], ids, jnp.float32), -1)

    def forward(params, frozen, key):
        return {train_step.TABLE: jnp.zeros((2, 4))}

    step = OneLogitStep(forward, read, noise_alpha=ALPHA)
    seen = {step.loss(steps, part) for steps in (0, 1) for part in (0, 1)}
    assert len(seen) == 4
    assert step.loss(1, 1) in seen  # As after a resume.
    np.testing.assert_allclose(step.held_out(), np.log(2.0), rtol=1e-6)
    quiet = OneLogitStep(forward, read)
    np.testing.assert_allclose(quiet.loss(0, 0), np.log(2.0), rtol=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [ONE, (2, 2, 2)], ids=str)
def test_a_step_is_noisy_in_the_same_way_again_and_evaluation_never(
    sizes, model, params, batch
):
    plain = make_definition(model, "lora", sizes)[0]
    noisy = dataclasses.replace(plain, noise_alpha=ALPHA)
    frozen = spread(params, model.specs, plain.mesh)
    adapters = plain.trainable.init(jax.random.key(0), params)
    rows = meshes.to_global(batch, plain.mesh, 2)
    step = train_step.jit_train_step(noisy)

    def loss_after(updates):
        own = spread(adapters, plain.trainable.specs, plain.mesh)
        state = train_step.jit_init(noisy)(own)
        state = dataclasses.replace(state, step=state.step + updates)
        return float(step(state, frozen, rows)[1]["means"]["loss"])

    first, again, later = loss_after(0), loss_after(0), loss_after(1)
    assert first == again  # As after a resume.
    assert abs(first - later) > 1e-4
    held_out = meshes.to_global(batch, plain.mesh)
    found = [
        jax.jit(functools.partial(train_step.eval_step, each))(
            adapters, frozen, held_out
        )
        for each in (plain, noisy)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    sums = found[0]["loss"]
    clean = float(jnp.sum(sums.numerator) / jnp.sum(sums.denominator))
    assert 1e-4 < abs(first - clean) < 1.0
