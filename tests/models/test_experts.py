"""A token is computed by its chosen experts, by nothing else, and none is dropped."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY, close, random_adapters, random_params

from research.config.choices import EXPERT_KERNELS
from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.data.token_batch import Batch
from research.models.architecture import Architecture, Experts
from research.models.parts.expert_dispatch import mix_experts
from research.models.parts.expert_kernels import choose_expert_kernel
from research.models.parts.experts import ExpertLoad, Router, compute_experts
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.weights.adapters import dora, lora, serving_bank
from research.weights.adapters.adapter_kind import with_own_patterns

MIXED = dataclasses.replace(
    TINY, mlp=24, experts=Experts(count=5, chosen=2, balance_weight=0.5)
)
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 1]], 4, axis=1).astype(np.int32)
POSITIONS = np.tile(np.arange(4, dtype=np.int32), (2, 3))
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab, (2, 12)).astype(np.int32)
BATCH = Batch(
    tokens=TOKENS,
    targets=np.roll(TOKENS, -1, axis=1),
    weights=np.float32(SEGMENTS != 0),
    segments=SEGMENTS,
    positions=POSITIONS,
    groups=np.zeros_like(TOKENS),
)


@pytest.fixture(scope="module")
def mixed():
    return Model(MIXED)


@pytest.fixture(scope="module")
def weights(mixed):
    return random_params(mixed.specs)


def normal(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


D, F, E = 6, 4, 5
STACKED = {
    "gate": (normal(E, D, F), None),
    "up": (normal(E, D, F, seed=1), None),
    "down": (normal(E, F, D, seed=2), None),
}
X = normal(2, 7, D, seed=3)
# Twice the same expert, none, and one that no token chooses.
CHOSEN = np.random.default_rng(4).integers(0, E - 1, (2, 7, 2)).astype(np.int32)
CHOSEN[0, 2], CHOSEN[1, 5, 1], CHOSEN[1, 6, 0] = (3, 3), E, -1
SHARES = jax.nn.softmax(normal(2, 7, 2, seed=5))


def every_expert(weights, x, shares):
    """The definition: all experts compute all tokens."""
    (gate, _), (up, _), (down, _) = (weights[n] for n in ("gate", "up", "down"))
    middle = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate))
    middle *= jnp.einsum("btd,edf->btef", x, up)
    made = jnp.einsum("btef,efd->bted", middle, down)
    picked = jax.nn.one_hot(CHOSEN, E) * shares[..., None]
    return jnp.einsum("btce,bted->btd", picked, made)


def sorted_rows(weights, x, shares, kernel="blocked", block=3):
    compute = functools.partial(compute_experts, "silu")
    return mix_experts(
        compute, weights, x, CHOSEN, shares, experts=E, kernel=kernel, block=block
    )


@pytest.mark.parametrize(
    "kernel, block", [("blocked", 3), ("blocked", 8), ("ragged_dot", 3)]
)
def test_a_token_is_the_weighted_sum_of_its_experts(kernel, block):
    """And so are the gradients of inputs, shares and weights."""

    def gradients(mix):
        def total(weights, x, shares):
            made = mix(weights, x, shares)
            return jnp.sum(jnp.sin(made)), made

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))

    blocked = functools.partial(sorted_rows, kernel=kernel, block=block)
    found = gradients(blocked)(STACKED, X, SHARES)
    close(found, gradients(every_expert)(STACKED, X, SHARES))


def test_the_backward_pass_keeps_two_products_of_each_row():
    """Rows are gathered again, and what experts put out is needed no more."""
    _, pull = jax.vjp(sorted_rows, STACKED, X, SHARES)
    wide = [x.shape for x in jax.tree.leaves(pull) if x.ndim == 2 and len(x) == 28]
    assert wide == [(28, F), (28, F)]


def route(renormalized, x, real=None):
    experts = Experts(E, 2, renormalized)
    router = Router(dataclasses.replace(TINY, embed=D, experts=experts), nnx.Rngs(0))
    return np.asarray(x @ router.matrix), router(x, real)


@pytest.mark.parametrize("renormalized", [True, False])
def test_shares_are_those_of_the_softmax_over_all_or_over_the_chosen(renormalized):
    logits, (chosen, shares, _) = route(renormalized, X)
    powers = np.exp(logits)
    probability = powers / powers.sum(-1, keepdims=True)
    best = np.argsort(-logits, axis=-1)[..., :2]
    np.testing.assert_array_equal(chosen, best)
    expected = np.take_along_axis(probability, best, -1)
    if renormalized:
        expected /= expected.sum(-1, keepdims=True)
    close(shares, expected)


def test_the_router_computes_in_float32():
    """In bfloat16 two logits that lie close would be equal."""
    _, (_, shares, load) = route(True, X.astype(jnp.bfloat16))
    assert shares.dtype == load.probability.dtype == jnp.float32


def test_padding_chooses_no_expert_and_counts_in_no_load():
    real = SEGMENTS[:, :7] != 0
    logits, (chosen, _, load) = route(True, X, jnp.array(real))
    assert (np.asarray(chosen)[~real] == E).all()
    assert load.tokens == real.sum() and load.assigned.sum() == 2 * real.sum()
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    close(load.probability, probability[real].sum(0))


def test_the_balance_loss_is_pooled_over_layers():
    """As `load_balancing_loss_func` of transformers: the layers' tokens are one set."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(3, 20, E))
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[..., :2]
    mask = np.eye(E)[chosen].reshape(-1, 2, E)
    shares = mask.mean(0)
    expected = E * (shares * probability.reshape(-1, E).mean(0)).sum()
    assigned = np.eye(E)[chosen].sum((1, 2))
    load = ExpertLoad(assigned, probability.sum(1), np.full(3, 20.0))
    close(load.balance_loss(), expected)
    even = ExpertLoad(np.full((3, E), 8.0), np.full((3, E), 4.0), np.full(3, 20.0))
    close(even.balance_loss(), 2.0)


def hidden_of(model):
    return jax.jit(lambda params, *row: model.hidden(params, *row))


def test_what_padding_holds_changes_nothing(mixed, weights):
    hidden = hidden_of(mixed)
    found = hidden(weights, TOKENS, POSITIONS, SEGMENTS)
    other = np.where(SEGMENTS == 0, (TOKENS + 5) % TINY.vocab, TOKENS)
    real = SEGMENTS != 0
    again = hidden(weights, other, POSITIONS, SEGMENTS)
    np.testing.assert_array_equal(found[real], again[real])
    assert np.isfinite(found).all()


def test_decoding_is_the_full_forward_pass(mixed, weights):
    """A prompt of five tokens in one call, then single tokens, in two slots."""
    whole = np.ones_like(SEGMENTS)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape)
    expected = hidden_of(mixed)(weights, TOKENS, places, whole)
    decode = jax.jit(mixed.decode)
    first, cache = decode(weights, TOKENS[:, :5], mixed.init_cache(2, 12))
    found = [first]
    for i in range(5, 12):
        one, cache = decode(weights, TOKENS[:, i : i + 1], cache)
        found.append(one)
    close(np.concatenate(found, axis=1), expected, rtol=1e-4)


def test_adapters_of_experts_compute_what_merged_weights_do(mixed, weights):
    config = LoRAConfig(rank=2, targets=(".",))
    adapters = random_adapters(lora.adapter_specs(mixed.specs, config))
    row = TOKENS, POSITIONS, SEGMENTS
    hidden = hidden_of(mixed)
    together = hidden(lora.adapt(weights, adapters, config), *row)
    close(together, hidden(lora.merge(weights, adapters, config), *row), rtol=1e-4)
    assert np.abs(together - hidden(weights, *row)).max() > 0.01


def test_each_row_of_a_batch_has_experts_of_its_own_adapter(mixed, weights):
    adapted = []
    for kind, config in (
        (lora.KIND, LoRAConfig(rank=2)),
        (dora.KIND, LoRAConfig(kind="dora", rank=2, targets=("mlp",))),
    ):
        factors = random_adapters(kind.specs(mixed.specs, config), len(adapted))
        adapted.append(kind.adapt(weights, factors, config))
    params = serving_bank.bank(weights, mixed.specs, adapters=3, rank=2, gains=True)
    for number, each in enumerate(adapted, 1):
        params = serving_bank.set_row(
            params, number, serving_bank.bank_row(params, each)
        )
    hidden, row = hidden_of(mixed), (TOKENS, POSITIONS, SEGMENTS)
    found = hidden(serving_bank.rows(params, jnp.array([2, 0])), *row)
    close(found[0], hidden(adapted[1], *row)[0], rtol=1e-4)
    close(found[1], hidden(weights, *row)[1], rtol=1e-4)


def test_the_router_is_frozen_unless_it_is_a_target(mixed):
    adapted = lora.adapter_specs(mixed.specs, LoRAConfig())
    assert not [path for path in adapted if "router" in path]
    # To PEFT on transformers 5 it is no linear layer.
    linear = with_own_patterns(LoRAConfig(targets=("all-linear",)), mixed.specs)
    assert lora.adapter_specs(mixed.specs, linear).keys() == adapted.keys()
    assert {p for p in adapted if ".mlp." in p} == {
        f"layers.mlp.{name}.kernel" for name in ("gate", "up", "down")
    }
    a, b = adapted["layers.mlp.up.kernel"].values()
    assert a.shape == (2, 5, TINY.embed, 16) and b.shape == (2, 5, 16, MIXED.mlp)


@pytest.fixture(scope="module")
def trained(mixed, weights):
    """Gradient and sums, with the weight of the balance loss."""

    @functools.cache
    def run(weight):
        objective = CrossEntropy(groups=1, chunk=5, balance_loss=weight)

        @jax.jit
        def step(params):
            return jax.grad(lambda p: objective.train(mixed, p, BATCH), has_aux=True)(
                params
            )

        return step(weights)

    return run


def test_the_load_of_experts_is_reported(trained, mixed, weights):
    _, sums = trained(-1.0)
    _, load = mixed.hidden_and_load(weights, TOKENS, POSITIONS, SEGMENTS)
    real = (SEGMENTS != 0).sum()
    assigned = np.asarray(load.assigned)
    assert assigned.shape == (2, 5) and assigned.sum() == 2 * 2 * real
    for expert in range(5):
        part, of = sums[f"expert_load/{expert}"]
        assert (part, of) == (assigned[:, expert].sum(), 4 * real)
    part, of = sums["busiest_expert"]
    close(part / of, np.mean(assigned.max(1) / assigned.sum(1)) * 5)
    part, of = sums["balance_loss"]
    close(part / of, load.balance_loss())


def test_the_balance_loss_counts_with_the_weight_of_the_config_or_the_model(trained):
    """Its gradient is added to that of the loss, per trained token."""
    router = "layers.router.kernel"
    without, own, set_so = (trained(w)[0][router] for w in (0.0, -1.0, 0.5))
    close(own, set_so)
    assert np.abs(own - without).max() > 1e-3 * np.abs(without).max()


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_dots_keeps_the_products_of_experts(mixed, weights):
    """The backward pass reads the matrix of an expert as often as without remat."""
    matrices = {(1, MIXED.embed, MIXED.mlp), (1, MIXED.mlp, MIXED.embed)}

    def reads(remat):
        model = mixed.with_options(remat=remat)

        def total(params):
            return jnp.sum(model.hidden(params, TOKENS, POSITIONS, SEGMENTS))

        traced = jax.make_jaxpr(jax.grad(total))(weights)
        return sum(
            each.primitive.name == "dynamic_slice"
            and each.outvars[0].aval.shape in matrices
            for each in equations(traced.jaxpr)
        )

    assert 0 < reads("none") == reads("dots") < reads("full")


def test_dense_models_report_no_load():
    dense = Model(TINY)
    objective = CrossEntropy(groups=1, chunk=5)
    params = random_params(dense.specs)
    _, sums = jax.eval_shape(lambda p: objective.train(dense, p, BATCH), params)
    assert {*sums} == {"loss"}


def test_matrices_of_a_layer_and_those_that_a_token_meets():
    specs = Model(MIXED).specs
    per_layer = sum(
        np.prod(s.shape[1:]) for s in specs.values() if s.stacked and s.n_in
    )
    assert MIXED.matrices_per_layer == per_layer
    unused = 3 * 3 * MIXED.embed * MIXED.mlp
    assert MIXED.used_per_layer == per_layer - unused
    assert TINY.used_per_layer == TINY.matrices_per_layer


def test_a_shape_without_experts_is_described_as_before():
    assert "experts" not in TINY.describe()
    assert "experts=Experts(count=5, chosen=2, balance" in MIXED.describe()


def test_more_experts_cannot_be_chosen_than_there_are():
    with pytest.raises(UserError, match="6 of 5 experts"):
        Experts(count=5, chosen=6)


@pytest.mark.parametrize(
    "wanted, platform, kernel",
    [
        ("auto", "cpu", "blocked"),
        ("auto", "tpu", "ragged_dot"),
        ("ragged_dot", "cpu", "ragged_dot"),
    ],
)
def test_the_kernel_follows_from_platform_and_config(wanted, platform, kernel):
    assert choose_expert_kernel(wanted, platform).kernel == kernel


def test_a_gpu_prefers_tokamax_where_it_is_installed(monkeypatch):
    for found, kernel in ((None, "ragged_dot"), (object(), "tokamax")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, f=found: f)
        assert choose_expert_kernel("auto", "cuda").kernel == kernel


def test_a_kernel_that_cannot_work_here_is_refused():
    with pytest.raises(UserError, match=r"'tokamax' cannot work here: .*this is cpu"):
        choose_expert_kernel("tokamax", "cpu")
    assert "tokamax" in EXPERT_KERNELS


def test_an_architecture_without_experts_has_no_router():
    a: Architecture = TINY
    assert not [path for path in Model(a).specs if "router" in path]


@pytest.mark.parametrize("size", ["6m", "125m"])
def test_small_shapes_with_experts_use_as_many_matrices_as_dense_ones(size):
    dense, mixed = PRESETS[f"llama-{size}"], PRESETS[f"mixtral-{size}"]
    router = mixed.embed * mixed.experts.count
    assert mixed.used_per_layer == dense.used_per_layer + router
