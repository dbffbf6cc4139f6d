"""LoRA changes what a model computes, exactly as its formula says, and nothing else."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import TINY, close, in_soak, random_adapters, random_params

from research.config.choices import ADAPTER_MODULES
from research.config.run_config import Config, LoRAConfig, ModelConfig, OptimConfig
from research.core.errors import UserError
from research.models.transformer import Model
from research.weights import parameter_paths, trainable
from research.weights.adapters import lora
from research.weights.adapters.adapter_kind import with_own_patterns
from research.weights.adapters.adapter_registry import find_kind
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.representations.lost_in_codes import LostInCodes
from research.weights.representations.low_rank import LowRank

EVERYTHING = LoRAConfig(rank=4, alpha=8.0, targets=(".",))
TIED = Model(dataclasses.replace(TINY, tied_head=True))
# One program each, where eager operations would be compiled one by one.
adapt, merge, unmerge = (
    jax.jit(function, static_argnums=2)
    for function in (lora.adapt, lora.merge, lora.unmerge)
)


def trained_adapters(specs, config, seed=5):
    return random_adapters(lora.adapter_specs(specs, config), seed)


def zero_adapters(specs, config):
    adapters = trained_adapters(specs, config)
    return {p: {"a": f["a"], "b": jnp.zeros_like(f["b"])} for p, f in adapters.items()}


@functools.cache
def jitted_logits(model):
    """Compiled once per model and kind of parameters, whichever test asks first."""

    @jax.jit
    def logits(params, batch):
        hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
        return model.logits(params, hidden)

    return logits


@pytest.mark.parametrize(
    "tied, dtype", [in_soak(False, jnp.bfloat16), (True, jnp.float32)], ids=str
)
def test_zero_b_is_bit_identical_to_the_base(model, batch, tied, dtype):
    model = (TIED if tied else model).with_options(dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(model.specs))
    adapted = adapt(params, zero_adapters(model.specs, EVERYTHING), EVERYTHING)
    logits = jitted_logits(model)
    assert (logits(params, batch) == logits(adapted, batch)).all()


@pytest.mark.parametrize("tied", [in_soak(False), True], ids=["untied", "tied"])
def test_adapted_equals_merged_and_differs_from_the_base(model, batch, tied):
    model = TIED if tied else model
    params = random_params(model.specs)
    adapters = trained_adapters(model.specs, EVERYTHING)
    logits = jitted_logits(model)
    merged = logits(merge(params, adapters, EVERYTHING), batch)
    close(logits(adapt(params, adapters, EVERYTHING), batch), merged)
    assert np.abs(merged - logits(params, batch)).max() > 0.1


def test_every_target_alone_changes_the_output(model, params, batch):
    logits = jitted_logits(model)
    base = logits(params, batch)
    adapters = trained_adapters(model.specs, EVERYTHING)
    merged = merge(params, adapters, EVERYTHING)
    for path in adapters:
        one = params | {path: merged[path]}
        assert np.abs(logits(one, batch) - base).max() > 1e-3, path


def test_unmerge_undoes_merge_and_neither_touches_its_input(model, params):
    adapters = trained_adapters(model.specs, EVERYTHING)
    before = jax.tree.map(np.array, params)
    merged = merge(params, adapters, EVERYTHING)
    back = unmerge(merged, adapters, EVERYTHING)
    for path, value in before.items():
        np.testing.assert_allclose(back[path], value, rtol=0, atol=1e-5, err_msg=path)
        np.testing.assert_array_equal(params[path], value, err_msg=path)
        assert np.abs(merged[path] - value).max() > 0.1 or path not in adapters, path


@pytest.mark.soak
def test_gradient_of_factors_is_the_gradient_through_the_merged_form(model, batch):
    """`adapt` never forms W + AB, `lift` does: the chain rule makes them agree."""
    params = random_params(model.specs)
    adapters = trained_adapters(model.specs, EVERYTHING)
    direction = np.random.default_rng(3).normal(size=(8, 24, TINY.vocab))

    def score(params):
        hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
        return jnp.sum(model.logits(params, hidden) * jnp.float32(direction))

    def adapted(params, adapters):
        return score(lora.adapt(params, adapters, EVERYTHING))

    lifted = lora.lift(score, EVERYTHING)
    factored = jax.jit(jax.grad(adapted, argnums=1))(params, adapters)
    formed = jax.jit(jax.grad(lifted, argnums=1))(params, adapters)
    for path in adapters:
        for factor in ("a", "b"):
            assert np.abs(formed[path][factor]).max() > 0
            close(factored[path][factor], formed[path][factor], rtol=1e-4)


def test_factors_have_the_stack_the_axes_and_the_names_of_their_base(model):
    factors = lora.adapter_specs(model.specs, EVERYTHING)
    layers, embed, heads, head_dim = TINY.layers, TINY.embed, TINY.heads, TINY.head_dim
    query = factors["layers.attention.query.kernel"]
    assert query["a"].shape == (layers, embed, 4)
    assert query["a"].axes == ("layers", "embed", "rank")
    assert query["b"].shape == (layers, 4, heads, head_dim)
    assert query["b"].axes == ("layers", "rank", "heads", "head_dim")
    output = factors["layers.attention.output.kernel"]
    assert output["a"].shape == (layers, heads, head_dim, 4)
    assert output["a"].axes == ("layers", "heads", "head_dim", "rank")
    assert output["b"].axes == ("layers", "rank", "embed")
    assert factors["embedding.table"]["a"].axes == ("vocab", "rank")
    # Norm scales are no matrices, whatever a pattern says.
    assert {p for p in model.specs if "norm" not in p} == set(factors)


def test_init_is_uniform_by_fan_in_and_starts_at_the_base(model):
    config = LoRAConfig(rank=40, targets=("output", "mlp.down"))
    adapters = lora.init(jax.random.key(0), model.specs, config)
    fan_in = {"attention.output": TINY.heads * TINY.head_dim, "mlp.down": TINY.mlp}
    for name, inputs in fan_in.items():
        factor = adapters[f"layers.{name}.kernel"]
        assert not factor["b"].any()
        bound = inputs**-0.5
        assert 0.98 * bound < np.abs(factor["a"]).max() <= bound
        np.testing.assert_allclose(np.std(factor["a"]), bound / 3**0.5, rtol=0.05)
        assert (factor["a"][0] != factor["a"][1]).any(), "layers start different"


def test_rank_pattern_overrides_and_the_last_match_wins(model):
    config = LoRAConfig(rank=4, rank_pattern=("mlp=2", r"mlp\.down=6"))
    factors = lora.adapter_specs(model.specs, config)
    ranks = {path.split(".")[2]: f["a"].shape[-1] for path, f in factors.items()}
    assert ranks == {
        "query": 4, "key": 4, "value": 4, "output": 4, "gate": 2, "up": 2, "down": 6,
    }  # fmt: skip
    again = ("mlp=2", r"mlp\.down=6", "mlp=3")
    factors = lora.adapter_specs(model.specs, LoRAConfig(rank_pattern=again))
    assert factors["layers.mlp.down.kernel"]["a"].shape[-1] == 3


def test_a_rank_above_the_matrix_is_refused_but_in_an_adapter_that_is_there(model):
    """Other tools have trained it, and fused matrices need the sum of their ranks."""
    config = LoRAConfig(rank=40, targets=("query", "key"))
    assert lora.adapter_specs(model.specs, config)[QUERY]["a"].shape[-1] == 40
    wide = dataclasses.replace(config, rank_pattern=("key=41",))
    said = (
        r"key.kernel cannot .* is 41, and .*\[40, 40\].*above 40: lower .*rank_pattern"
    )
    with pytest.raises(UserError, match=said):
        trainable.require_new_ranks(wide, model.specs)
    # A run that has begun keeps its ranks.
    assert lora.adapter_specs(model.specs, wide)[KEY]["a"].shape[-1] == 41
    found = dataclasses.replace(wide, init_from="adapter")
    trainable.require_new_ranks(found, model.specs)
    # EVA's factors have more room than the rank, which is what counts.
    eva = dataclasses.replace(config, kind="eva", eva_rho=1.0, rank_pattern=("key=41",))
    with pytest.raises(UserError, match=r"key.kernel cannot"):
        trainable.require_new_ranks(eva, model.specs)


def test_alpha_pattern_scales_its_matches_only(model, params):
    config = LoRAConfig(rank=4, alpha=8.0, alpha_pattern=(r"mlp\.up=2",))
    adapted = lora.adapt(params, zero_adapters(model.specs, config), config)
    assert (adapted["layers.mlp.up.kernel"].scale == 2 / 4).all()
    assert (adapted["layers.mlp.down.kernel"].scale == 8 / 4).all()


@pytest.mark.parametrize(
    "override", ["mlp", "mlp=", "mlp=x", "mlp=0", "mlp=-1", "mlp=nan", "mlp=4.5"]
)
def test_a_rank_that_is_no_whole_positive_number_is_refused(model, override):
    with pytest.raises(UserError, match="mlp"):
        lora.adapter_specs(model.specs, LoRAConfig(rank_pattern=(override,)))


def test_a_pattern_that_matches_nothing_lists_the_paths(model):
    with pytest.raises(UserError) as raised:
        lora.adapter_specs(model.specs, LoRAConfig(targets=("mlp", "quary")))
    assert "'quary' matches no parameter (did you mean 'query'?)" in str(raised.value)
    for path in model.specs:
        assert "norm" in path or path in str(raised.value)
    with pytest.raises(UserError, match="embedding"):
        # Matched against what is adapted: elsewhere it would do nothing.
        lora.adapter_specs(model.specs, LoRAConfig(rank_pattern=("embedding=2",)))


ATTENTION, MLP = "layers.attention.{}.kernel", "layers.mlp.{}.kernel"
LAYERS = {
    *(ATTENTION.format(x) for x in ("query", "key", "value", "output")),
    *(MLP.format(x) for x in ("gate", "up", "down")),
}
QUERY, KEY, VALUE = map(ATTENTION.format, ("query", "key", "value"))


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("q_proj",), {QUERY}),
        (("q_proj", "v_proj"), {QUERY, VALUE}),
        (("q_proj,v_proj",), {QUERY, VALUE}),
        (("q_proj, value",), {QUERY, VALUE}),
        (("self_attn.q_proj", "mlp.down_proj"), {QUERY, MLP.format("down")}),
        (("(q|v)_proj",), {QUERY, VALUE}),
        ((r".*\.(q_proj|v_proj)",), {QUERY, VALUE}),
        (("lm_head", "gate_proj"), {"head.kernel", MLP.format("gate")}),
        (("embed_tokens",), {"embedding.table"}),
        (("all-linear",), LAYERS),
        (("all-linear", "lm_head"), {*LAYERS, "head.kernel"}),
        (("attention", "mlp"), LAYERS),
    ],
    ids=str,
)
def test_names_of_hugging_face_are_targets_too(model, targets, expected):
    config = with_own_patterns(LoRAConfig(targets=targets), model.specs)
    assert lora.adapter_specs(model.specs, config).keys() == expected
    split = trainable.make(
        "lora", ModelConfig(), LoRAConfig(targets=targets), model.specs
    )
    assert split.specs.keys() == expected


def test_names_of_hugging_face_have_ranks_and_alphas(model):
    config = LoRAConfig(
        rank=4, targets=("all-linear",), rank_pattern=("mlp=8", "q_proj=2"),
        alpha_pattern=("self_attn.k_proj=6",),
    )  # fmt: skip
    own = with_own_patterns(config, model.specs)
    factors = lora.adapter_specs(model.specs, own)
    ranks = {path: lora.KIND.rank(each) for path, each in factors.items()}
    assert (ranks[QUERY], ranks[VALUE], ranks[MLP.format("up")]) == (2, 4, 8)
    scales = lora.KIND.settings(ranks, own).scales
    assert scales[ATTENTION.format("key")] == 6 / 4 and scales[VALUE] == 32 / 4
    assert with_own_patterns(own, model.specs) == own


@pytest.mark.parametrize(
    "target, said",
    [
        ("q_prj", "did you mean 'q_proj'"),
        ("self_attn", "layers.attention.query.kernel (self_attn.q_proj)"),
        ("model.layers.0.self_attn.q_proj", "head.kernel (lm_head)"),
        ("q_proj,w_proj", "'w_proj' matches no parameter"),
        ("input_layernorm", "layers.mlp.up.kernel (mlp.up_proj)"),
    ],
)
def test_an_unknown_target_lists_what_exists(model, target, said):
    with pytest.raises(UserError) as raised:
        trainable.make(
            "lora", ModelConfig(), LoRAConfig(targets=(target,)), model.specs
        )
    assert said in str(raised.value)


def test_a_tied_head_is_no_target():
    with pytest.raises(UserError, match="'lm_head' matches no parameter"):
        with_own_patterns(LoRAConfig(targets=("lm_head",)), TIED.specs)


@pytest.mark.parametrize("targets", [(), ("*",), ("mlp(",)], ids=str)
def test_targets_that_are_no_patterns_are_the_users_error(model, targets):
    with pytest.raises(UserError):
        lora.adapter_specs(model.specs, LoRAConfig(targets=targets))


def test_an_adapter_for_another_model_is_refused(model, params):
    adapters = zero_adapters(TIED.specs, EVERYTHING)
    with pytest.raises(ValueError, match="elsewhere"):
        lora.adapt(params, {"elsewhere": adapters["embedding.table"]}, EVERYTHING)


def test_count_is_rank_times_inputs_plus_outputs(model):
    adapters = zero_adapters(model.specs, EVERYTHING)
    expected = 0
    for path in adapters:
        spec = model.specs[path]
        split = spec.stacked + spec.n_in
        ends = math.prod(spec.in_shape) + math.prod(spec.shape[split:])
        expected += math.prod(spec.shape[: spec.stacked]) * 4 * ends
    assert lora.count(adapters) == expected


def test_vmap_over_three_adapters_is_three_runs(batch):
    params = random_params(TIED.specs)
    three = [trained_adapters(TIED.specs, EVERYTHING, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *three)

    def run(adapters):
        return jitted_logits(TIED)(adapt(params, adapters, EVERYTHING), batch)

    together = jax.vmap(run)(stacked)
    for i, adapters in enumerate(three):
        close(together[i], run(adapters))
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_dropout_needs_a_key_and_differs_by_layer_and_matrix(model, params):
    config = LoRAConfig(rank=4, dropout=0.5)
    adapters = zero_adapters(model.specs, config)
    for path, leaf in adapt(params, adapters, config).items():
        assert not isinstance(leaf, LowRank) or leaf.key is None, path
    keyed = adapt(params, adapters, config, jax.random.key(0))
    leaves = [leaf for leaf in keyed.values() if isinstance(leaf, LowRank)]
    keys = np.concatenate([jax.random.key_data(leaf.key) for leaf in leaves])
    assert len(np.unique(keys, axis=0)) == TINY.layers * len(adapters)
    assert {float(r) for leaf in leaves for r in np.ravel(leaf.rate)} == {0.5}


def test_dropout_reaches_the_scanned_layers(model, params, batch):
    config = LoRAConfig(rank=4, dropout=0.5, targets=(r"mlp\.up",))
    adapters = trained_adapters(model.specs, config)

    @jax.jit
    def logits(key):
        return jitted_logits(model)(lora.adapt(params, adapters, config, key), batch)

    first, again = logits(jax.random.key(0)), logits(jax.random.key(0))
    assert (first == again).all()
    assert np.abs(first - logits(jax.random.key(1))).max() > 0.1


def input_directions(inputs, count):
    """The directions that a run finds for inputs `[n, in]` of one matrix."""
    inputs = np.asarray(inputs)
    _, sizes, right = np.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
    shares = sizes**2 / np.sum(sizes**2)
    return InputDirections(jnp.array(right[:count].T), jnp.array(shares[:count]))


def started(kind, specs, config, params, hidden):
    """The start of a kind, and the parameters over which it trains.

    `hidden` are the inputs `[n, in]` of each matrix in turn.
    """
    base, structure = parameter_paths.flatten(params)
    paths = find_kind(kind).specs(specs, config)
    key, inputs = jax.random.key(0), {}
    if kind in ("eva", "qera"):
        inputs = {p: input_directions(x, 6) for p, x in zip(paths, hidden, strict=True)}
        with pytest.raises(UserError, match="the run's own first batches"):
            find_kind(kind).init(key, specs, config, base)
    if kind in ("loftq", "qera"):  # Their base is in codes: they start from the rest.
        coded = base | {path: jnp.round(base[path] * 2) / 2 for path in paths}
        lost = {path: LostInCodes(base[path], coded[path]) for path in paths}
        start = find_kind(kind).init(key, specs, config, lost, inputs)
        return start, parameter_paths.unflatten(structure, coded)
    return find_kind(kind).init(key, specs, config, base, inputs), params


def check_lifted(function, params, kind):
    """The start is the model itself, and training adapters alone lowers the loss."""
    targets, rho = ("kernel",), 1.5 if kind == "eva" else 2.0
    config = LoRAConfig(kind=kind, rank=4, alpha=4.0, targets=targets, eva_rho=rho)
    specs = lora.specs_of(params, config)
    x = jnp.float32(np.random.default_rng(0).normal(size=(16, 6)))
    flat = parameter_paths.flatten(params)[0]
    first = next(path for path in flat if "dense0.kernel" in path)
    bias = next((flat[path] for path in flat if "dense0.bias" in path), 0.0)
    hidden = (x, jax.nn.relu(x @ flat[first] + jnp.broadcast_to(bias, (16, 8))))
    expected, whole = function(params, x), params
    adapters, params = started(kind, specs, config, params, hidden)
    assert sorted(path.removesuffix(".value").split(".")[-2:] for path in adapters) == [
        ["dense0", "kernel"],
        ["dense1", "kernel"],
    ]
    lifted = lora.lift(function, config)
    if kind in ("loftq", "qera"):
        left = np.linalg.norm(lifted(params, adapters, x) - expected)
        assert left < 0.6 * np.linalg.norm(function(params, x) - function(whole, x))
    else:
        close(lifted(params, adapters, x), expected)
    if find_kind(kind).is_exact and kind in ("lora", "gaussian", "eva", "vera"):
        assert (lifted(params, adapters, x) == expected).all()
    rate = 1.0 if kind == "vera" else 0.1  # It has few and small numbers.

    @jax.jit
    def descend(adapters):
        def loss(adapters):
            return jnp.mean((lifted(params, adapters, x) - x) ** 2)

        value, slope = jax.value_and_grad(loss)(adapters)
        return jax.tree.map(lambda p, g: p - rate * g, adapters, slope), value

    start, losses = adapters, []
    for _ in range(30):
        adapters, value = descend(adapters)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0], losses
    for path, own in adapters.items():
        still = {name for name, x in own.items() if (x == start[path][name]).all()}
        assert still == {name for name in own if name.endswith("0")}, path


def nnx_model():
    class MLP(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense0 = nnx.Linear(6, 8, rngs=rngs)
            self.dense1 = nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x):
            return self.dense1(nnx.relu(self.dense0(x)))

    graph, state = nnx.split(MLP(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def linen_model():
    class MLP(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = linen.relu(linen.Dense(8, name="dense0")(x))
            return linen.Dense(6, name="dense1")(hidden)

    model = MLP()
    return model.apply, model.init(jax.random.key(0), jnp.zeros((1, 6)))


@pytest.mark.parametrize(
    "make, kind",
    [
        (make, kind) if i % 2 == j else in_soak(make, kind)
        for i, kind in enumerate(ADAPTER_MODULES)
        for j, make in enumerate((nnx_model, linen_model))
    ],
)
def test_lift_trains_every_kind_on_a_flax_model_that_is_not_ours(make, kind):
    check_lifted(*make(), kind)


def test_lift_trains_a_plain_function_of_nested_parameters():
    rng = np.random.default_rng(1)
    params = {
        "dense0": {"kernel": jnp.float32(rng.normal(size=(6, 8))), "bias": jnp.ones(8)},
        "dense1": {"kernel": jnp.float32(rng.normal(size=(8, 6)))},
    }

    def apply(params, x):
        hidden = x @ params["dense0"]["kernel"] + params["dense0"]["bias"][None]
        return jnp.tanh(hidden) @ params["dense1"]["kernel"]

    check_lifted(apply, params, "lora")


@pytest.mark.parametrize(
    "kind, empty, per_layer",
    [
        ("lora", "b", lambda inputs, outputs: 2 * (inputs + outputs)),
        ("pissa", "", lambda inputs, outputs: 2 * (inputs + outputs)),
        ("dora", "b", lambda inputs, outputs: 2 * (inputs + outputs) + outputs),
        ("vera", "lambda_b", lambda inputs, outputs: 2 + outputs),
    ],
)
def test_layers_without_adapters_are_zero_and_not_counted(
    kind, empty, per_layer, model, params
):
    targets = ("query", "embedding") if kind != "vera" else ("query",)
    config = LoRAConfig(kind=kind, rank=2, targets=targets, layers="1")
    split = trainable.make("lora", ModelConfig(), config, model.specs)
    start = split.init(jax.random.key(0), params)
    for name, spec in split.specs[QUERY].items():
        if spec.axes[0] != "layers":  # VeRA's matrices belong to all layers.
            continue
        assert not np.any(start[QUERY][name][0]), name
        assert np.any(start[QUERY][name][1]) == (name != empty), name
    leaf = split.forward(start, params, None)[QUERY]
    low = getattr(leaf, "inner", leaf)  # An export drops a layer of zeros.
    assert [np.any(x) for x in low.a] == [False, True]
    assert not np.any(low.b[0])
    if kind != "vera":
        assert start["embedding.table"]["a"].shape == (TINY.vocab, 2)
    every = trainable.make(
        "lora", ModelConfig(), dataclasses.replace(config, layers=""), model.specs
    )
    inputs, outputs = model.specs[QUERY].as_matrix.shape[-2:]
    assert every.count - split.count == per_layer(inputs, outputs)


@pytest.mark.parametrize(
    "layers, targets, said",
    [
        ("0-2", "mlp", "has 0-2, and .* are 0 to 1"),
        ("1-0", "mlp", "has 1-0"),
        ("a", "mlp", "is 'a'; give"),
        ("1", "embedding", r"is '1', and no .* layer \(embedding.table\): name one in"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, targets, said, model):
    config = LoRAConfig(layers=layers, targets=(targets,))
    with pytest.raises(UserError, match=said):
        lora.adapter_specs(model.specs, config)


def test_vera_has_no_factors_b_for_loraplus():
    lora, optim = LoRAConfig(kind="vera"), OptimConfig(rate_pattern=("[.]b$=16",))
    with pytest.raises(UserError, match=r"'vera', .*and VeRA trains none: drop the"):
        Config(lora=lora, optim=optim)
    own = dataclasses.replace(optim, rate_pattern=("lambda_b$=16",))
    Config(lora=lora, optim=own)
