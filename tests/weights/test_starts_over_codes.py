"""Starts of adapters that bring back what codes have lost: LoftQ and QERA."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak

from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.data.token_batch import Batch
from research.export.trained_over import require_own_codes
from research.train.step.input_directions import measure_directions
from research.weights.adapters.adapter_registry import find_kind
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.contraction import contract
from research.weights.parameter_spec import Spec
from research.weights.representations.lost_in_codes import LostInCodes

SPEC = Spec((2, 24, 4, 5), ("layers", "embed", "heads", "head_dim"), stacked=1)
CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=("w",))


def drawn(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def over_zeros(lost):
    """As if codes had lost all of it."""
    return LostInCodes(jnp.array(lost), jnp.zeros(lost.shape))


def skewed_inputs():
    """`[2, 200, 24]` with a mean, and more in some directions than in others."""
    mixed = drawn(2, 200, 24) * np.geomspace(5, 0.1, 24, dtype=np.float32)
    return mixed @ drawn(24, 24, seed=1) + 2 * drawn(24, seed=2)


def all_directions(x):
    sizes, turns = np.linalg.eigh(np.swapaxes(x, 1, 2) @ x)
    sizes, turns = sizes[:, ::-1], turns[:, :, ::-1]
    return InputDirections(
        jnp.array(turns), jnp.array(sizes / sizes.sum(1, keepdims=True))
    )


@functools.cache
def product(kind, told):
    """The start of `kind` as one matrix for each layer, where `told` directions of
    the inputs are known."""
    lost, x = drawn(*SPEC.shape, seed=3), skewed_inputs()
    inputs = all_directions(x)
    inputs = InputDirections(inputs.directions[:, :, :told], inputs.shares[:, :told])
    start = find_kind(kind).init(
        jax.random.key(0), {"w": SPEC}, CONFIG, {"w": over_zeros(lost)}, {"w": inputs}
    )["w"]
    assert start["a"].shape == (2, 24, 3) and start["b"].shape == (2, 3, 4, 5)
    update = 2.0 * np.asarray(start["a"]) @ np.asarray(start["b"]).reshape(2, 3, 20)
    return x, lost.reshape(2, 24, 20), update


def missed(x, lost, update):
    """How much of the outputs is lost, of each layer."""
    return np.linalg.norm(x @ (lost - update), axis=(1, 2))


def test_qera_loses_the_least_of_the_outputs_that_its_rank_allows():
    x, lost, update = product("qera", told=24)
    sizes = np.linalg.svd(x @ lost, compute_uv=False)
    least = np.sqrt(np.sum(sizes[:, 3:] ** 2, 1))  # Eckart and Young.
    close(missed(x, lost, update), least, 1e-3)


def test_a_few_directions_are_enough_and_loftq_knows_none():
    some, exact = (missed(*product("qera", told)) for told in (8, 24))
    blind = missed(*product("loftq", told=8))
    assert (some < 1.1 * exact).all() and (blind > 1.4 * some).all()
    # Inputs that are alike in all directions are those of LoftQ.
    lost = {"w": over_zeros(drawn(*SPEC.shape, seed=3))}
    even = InputDirections(
        jnp.broadcast_to(jnp.eye(24)[:, :6], (2, 24, 6)), jnp.full((2, 6), 1 / 24)
    )
    key = jax.random.key(0)
    expected = find_kind("loftq").init(key, {"w": SPEC}, CONFIG, lost)["w"]
    found = find_kind("qera").init(key, {"w": SPEC}, CONFIG, lost, {"w": even})["w"]
    products = (np.matmul(x["a"], x["b"].reshape(2, 3, 20)) for x in (found, expected))
    close(*products, 1e-3)


@pytest.mark.parametrize("kind", ["qera", in_soak("eva")])
def test_directions_are_those_of_the_mean_square_or_of_the_variance(kind):
    """An error in the mean of the inputs counts for QERA; EVA takes the mean off."""
    table, weight = skewed_inputs()[0], drawn(24, 20)
    # Padding, the last 40, counts for nothing.
    real = np.arange(200).reshape(2, 100) < 160

    def hidden(params, tokens, positions, segments):
        return contract(jnp.array(table)[tokens], params["w"])

    tokens = np.arange(200).reshape(1, 2, 100)
    weights = np.ones(tokens.shape, np.float32)
    batch = Batch(tokens, tokens, weights, np.int32(real)[None], tokens, tokens)
    definition = SimpleNamespace(
        model=SimpleNamespace(hidden=hidden),
        trainable=SimpleNamespace(kind=find_kind(kind)),
    )
    specs = {"w": {"a": Spec((24, 3), ("embed", "rank"))}}
    found = measure_directions(definition, {"w": jnp.array(weight)}, [batch], specs)
    x = table[np.ravel(real)]
    x = x - x.mean(0) if kind == "eva" else x
    expected = all_directions(x[None])
    told = 3 if kind == "eva" else 12
    assert found["w"].directions.shape == (24, told)
    close(found["w"].shares[:3], expected.shares[0, :3], 1e-3)
    along = np.abs(found["w"].directions[:, :3].T @ expected.directions[0, :, :3])
    np.testing.assert_allclose(along, np.eye(3), atol=0.02)


def test_without_rows_there_is_no_start():
    with pytest.raises(UserError, match="'qera' start from the inputs of w in the run"):
        find_kind("qera").init(
            jax.random.key(0), {"w": SPEC}, CONFIG, {"w": drawn(*SPEC.shape)}
        )


@pytest.mark.parametrize("kind", ["loftq", "qera"])
@pytest.mark.parametrize(
    "base, formats, said",
    [
        ("original", ("hf",), "--base=original puts them over weights that have lost"),
        ("dequantised", ("hf", "peft"), "--format=peft puts them"),
        ("dequantised", ("gguf-adapter",), "--format=gguf-adapter puts them"),
    ],
)
def test_they_lie_over_their_own_codes_alone(kind, base, formats, said):
    with pytest.raises(UserError, match=f"{kind}.*{said}"):
        require_own_codes(kind, base, formats)
    require_own_codes(kind, "dequantised", ("hf", "gguf"))
    require_own_codes("pissa", base, formats)
