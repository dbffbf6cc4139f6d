"""Each kind of adapter trains as PEFT trains it, from PEFT's own start.

`golden/training.py` recorded losses, adapters and merged weights.
"""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak
from peft_exports import write_adapter

from research.config.run_config import LoRAConfig, OptimConfig
from research.core.errors import UserError
from research.data.token_batch import Batch
from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    read_hf_config,
)
from research.formats.load_parameters import load_params
from research.formats.peft.adapter_folder import AdapterFolder
from research.formats.peft.peft_export import plan_adapter
from research.models.transformer import Model
from research.train.step.input_directions import measure_directions
from research.train.step.optimizers import make_optimizer
from research.weights.adapters.adapter_registry import find_kind

GOLDEN = Path(__file__).parents[1] / "golden"
RATE = 5e-3
MODULES = {
    "layers.attention.query.kernel": "model.layers.{}.self_attn.q_proj",
    "layers.attention.key.kernel": "model.layers.{}.self_attn.k_proj",
    "layers.mlp.down.kernel": "model.layers.{}.mlp.down_proj",
    "embedding.table": "model.embed_tokens",
}
QUERY, KEY, DOWN, TABLE = MODULES
LINEAR = (QUERY, DOWN)
LORAPLUS = {"rate_pattern": (r"\.b$=16",)}
# How a config asks for what `golden/training.py` asks PEFT for.
CASES = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {}),
    "loraplus": ({}, LORAPLUS),
    "gaussian": ({"kind": "gaussian"}, {}),
    "orthogonal": ({"kind": "orthogonal"}, {}),
    "pissa": ({"kind": "pissa"}, {}),
    "olora": ({"kind": "olora"}, {}),
    "dora": ({"kind": "dora", "targets": (*LINEAR, TABLE)}, {}),
    "pissa_niter": ({"kind": "pissa", "pissa_niter": 4}, {}),
    "eva": ({"kind": "eva"}, {}),
    "eva_labels": ({"kind": "eva", "targets": (QUERY, KEY, DOWN)}, {}),
    "vera": ({"kind": "vera"}, {"learning_rate": 0.2}),
    "vera_layers": ({"kind": "vera", "layers": "1"}, {"learning_rate": 0.2}),
    "dora_layers": ({"kind": "dora", "layers": "1"}, {"learning_rate": 1e-2}),
    "dora_dropout": ({"kind": "dora"}, {}),
}
# The others run the programs of these, or take longer than a quick test may.
STARTS = ("eva_labels", "dora_dropout")
PROGRAMS = ("lora", "rslora", "loraplus", "pissa", "dora", "vera")
PROGRAMS += ("vera_layers", "dora_layers")


def config_of(case):
    return LoRAConfig(**{"rank": 4, "alpha": 6.0, "targets": LINEAR} | CASES[case][0])


@functools.cache
def base():
    """The tiny model of the golden runs, float32, on one device."""
    folder = GOLDEN / "llama2"
    model = Model(read_hf_config(folder))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = dict.fromkeys(model.specs, here)
    return model, load_params(HuggingFaceWeights(folder), model, where, np.float32)


@functools.cache
def recorded(case):
    with np.load(GOLDEN / "training" / f"{case}.npz") as arrays:
        return dict(arrays)


def factors_of(case, when):
    """Arrays that PEFT has at `when`, such as "start" or "final", in our shapes.

    Zeros stand for layers without adapters.
    """
    model, found = base()[0], {}
    for path in config_of(case).targets:
        spec, module = model.specs[path], MODULES[path]
        outputs = spec.shape[spec.stacked + spec.n_in :]
        ends = {
            "lora_A.weight": ("a", (*spec.in_shape, -1)),
            "lora_B.weight": ("b", (-1, *outputs)),
            "lora_embedding_A": ("a", (*spec.in_shape, -1)),
            "lora_embedding_B": ("b", (-1, *outputs)),
            "lora_magnitude_vector": ("magnitude", outputs),
            "vera_lambda_d": ("lambda_d", (-1,)),
            "vera_lambda_b": ("lambda_b", outputs),
        }
        layers = range(spec.shape[0] if spec.stacked else 1)
        own = {}
        for end, (name, shape) in ends.items():
            keys = [f"{when} base_model.model.{module.format(i)}.{end}" for i in layers]
            if keys[-1] in recorded(case):
                empty = np.zeros_like(recorded(case)[keys[-1]])
                values = [recorded(case).get(x, empty).T.reshape(shape) for x in keys]
                values = _with_one_rank(values, name)
                own[name] = jnp.stack(values) if spec.stacked else jnp.array(values[0])
        found[path] = own
    return found


def _with_one_rank(values, name):
    """EVA's ranks differ by layer; here each has room for the largest that it gives."""
    axis = {"a": -1, "b": 0}.get(name)
    sizes = {value.shape[axis] for value in values} if axis is not None else {0}
    if len(sizes) == 1:
        return values

    def wide(value):
        missing = [(0, 0)] * value.ndim
        missing[axis] = (0, 8 - value.shape[axis])
        return np.pad(value, missing)

    return [wide(value) for value in values]


def started(case):
    """PEFT's start, with what our kinds keep beside it."""
    kind, config = find_kind(config_of(case).kind), config_of(case)
    start = factors_of(case, "start")
    if kind.name == "vera":  # PEFT's shared matrices, as far as a matrix uses them.
        a, b = (recorded(case)[f"start base_model.vera_{x}"] for x in "AB")
        for path, own in start.items():
            spec = base()[0].specs[path]
            inputs, outputs = spec.as_matrix.shape[-2:]
            own["a0"] = jnp.array(a[:, :inputs].T.reshape(*spec.in_shape, -1))
            own["b0"] = jnp.array(
                b[:outputs].T.reshape(-1, *spec.shape[spec.stacked + spec.n_in :])
            )
    elif "a0" in next(iter(kind.specs(base()[0].specs, config).values())):
        start = {p: f | {"a0": f["a"], "b0": f["b"]} for p, f in start.items()}
    return kind, config, start


@functools.partial(jax.jit, static_argnums=0)
def slope(kind, adapters, settings, tokens):
    """The loss of PEFT's steps, and its gradient. Settings are traced."""

    def loss(adapters):
        return loss_of(kind.attach(base()[1], adapters, settings), tokens)

    return jax.value_and_grad(loss)(adapters)


def loss_of(weights, tokens):
    """That of PEFT's steps."""
    model, inputs = base()[0], tokens[:, :-1]
    places = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden = model.hidden(weights, inputs, places, jnp.ones_like(inputs))
    likely = jax.nn.log_softmax(model.logits(weights, hidden))
    return -jnp.mean(jnp.take_along_axis(likely, tokens[:, 1:, None], -1))


@pytest.mark.parametrize(
    "case", [x if x in PROGRAMS else in_soak(x) for x in CASES if x not in STARTS]
)
def test_twenty_steps_follow_those_of_peft(case):
    kind, config, adapters = started(case)
    settings = kind.settings(kind.ranks(adapters), config)
    settings = jax.tree.map(jnp.float32, settings)
    optim = OptimConfig(
        **{"learning_rate": RATE} | CASES[case][1], schedule="constant", warmup=0.0,
        b2=0.999, clip_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(optim, 20, kind.specs(base()[0].specs, config))
    state, losses, rows = optimizer.init(adapters), [], recorded(case)["rows"]

    @jax.jit
    def update(gradients, state, adapters):
        updates, state = optimizer.update(gradients, state, adapters)
        return jax.tree.map(jnp.add, adapters, updates), state

    for number in range(20):
        batch = rows[number % len(rows)]
        value, gradients = slope(kind, adapters, settings, batch)
        adapters, state = update(gradients, state, adapters)
        losses.append(float(value))
    np.testing.assert_allclose(losses, recorded(case)["losses"], rtol=0, atol=1e-4)
    for path, own in factors_of(case, "final").items():
        for name, value in own.items():
            np.testing.assert_allclose(
                adapters[path][name], value, rtol=0, atol=1e-3, err_msg=f"{path} {name}"
            )


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "vera"])
def test_a_merge_in_bfloat16_has_the_bits_of_peft(case):
    config, adapters = config_of(case), factors_of(case, "final")
    adapters = {p: own | adapters[p] for p, own in started(case)[2].items()}
    params = {path: base()[1][path].astype(jnp.bfloat16) for path in adapters}
    merged = find_kind(config.kind).merge(params, adapters, config)
    for path, value in merged.items():
        spec = base()[0].specs[path]
        value = np.asarray(value).view(np.int16).reshape(-1, *spec.as_matrix.shape[-2:])
        for layer, own in enumerate(value):
            module = MODULES[path].format(layer)
            peft = recorded(case)[f"merged base_model.model.{module}"]
            own = own if path == "embedding.table" else own.T
            np.testing.assert_array_equal(own, peft, err_msg=module)


def test_a_fast_start_out_of_the_weights_is_nearly_the_exact_one():
    """As near to the weight as PEFT's, and nearer, since it has spare directions."""
    kind, config, peft = started("pissa_niter")
    model, params = base()
    starts = {
        rounds: kind.init(
            jax.random.key(0), model.specs,
            dataclasses.replace(config, pissa_niter=rounds), params,
        )
        for rounds in (0, 4)
    }  # fmt: skip
    for path in peft:
        whole = params[path].reshape(2, *model.specs[path].as_matrix.shape[-2:])
        exact, ours, theirs = (
            np.linalg.norm(
                whole
                - 1.5 * np.matmul(f["a"].reshape(2, -1, 4), f["b"].reshape(2, 4, -1))
            )
            for f in (starts[0][path], starts[4][path], peft[path])
        )
        assert exact <= ours * (1 + 1e-6) and ours <= theirs * (1 + 1e-6)
        assert ours <= 1.002 * exact


@pytest.mark.parametrize("case", ["eva", "eva_labels"])
def test_evas_ranks_and_directions_are_those_of_peft(case):
    """Both read the same batches; sums of PEFT forget a part of them."""
    kind, config, peft = started(case)
    model, params = base()
    tokens = recorded(case)["rows"][:, :, :-1]
    places = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
    zeros = np.zeros(tokens.shape, np.int32)
    # PEFT's labels lie on the tokens, and weights on those that predict them.
    labels = recorded(case).get("labels", tokens)
    weights = np.roll(labels != -100, -1, -1)
    # Padding counts for nothing.
    tokens, places, real, weights = (
        np.pad(x, [(0, 0), (0, 0), (0, 5)]).astype(np.int32)
        for x in (tokens, places, zeros + 1, weights)
    )
    batch = Batch(tokens, tokens, np.float32(weights), real, places, tokens)
    split = SimpleNamespace(kind=kind)
    definition = SimpleNamespace(model=model, trainable=split)
    specs = kind.specs(model.specs, config)
    found = measure_directions(definition, params, [batch], specs)
    start = kind.init(jax.random.key(0), model.specs, config, params, found)
    for path, own in start.items():
        assert not own["b"].any()
        a, theirs = (
            np.asarray(x).reshape(2, -1, x.shape[-1])
            for x in (own["a"], peft[path]["a"])
        )
        ranks = [np.linalg.matrix_rank(x) for x in a]
        assert ranks == [np.linalg.matrix_rank(x) for x in theirs]
        for rank, mine, other in zip(ranks, a, theirs, strict=True):
            mine, other = mine[:, :rank], other[:, :rank]
            np.testing.assert_allclose(mine.T @ mine, np.eye(rank), atol=1e-5)
            # Each of PEFT's directions lies within the space of ours.
            assert np.linalg.norm(mine.T @ other, axis=0).min() > 0.9
    settings = kind.settings(kind.ranks(start), config)
    assert set(settings.scales.values()) == {1.5}


def test_batches_without_a_trained_token_have_no_directions():
    tokens = recorded("eva")["rows"][:, :, :-1]
    batch = Batch(tokens, tokens, np.zeros(tokens.shape, np.float32), *(tokens,) * 3)
    split = SimpleNamespace(kind=find_kind("eva"))
    definition = SimpleNamespace(model=base()[0], trainable=split)
    with pytest.raises(UserError, match=r"first 2 batches is trained, .*eva_batches"):
        measure_directions(definition, {}, [batch] * 2, {})


@pytest.mark.parametrize("case", ["pissa", "olora"])
def test_a_start_out_of_the_weights_is_that_of_peft(case):
    """Singular vectors have no sign of their own, so products are compared."""
    kind, config, peft = started(case)
    model, params = base()
    start = kind.init(jax.random.key(0), model.specs, config, params)
    for path, own in start.items():
        products = [
            np.matmul(f["a"].reshape(2, -1, 4), f["b"].reshape(2, 4, -1))
            for f in (own, peft[path])
        ]
        np.testing.assert_allclose(*products, rtol=0, atol=1e-4)
        assert (own["a"] == own["a0"]).all() and (own["b"] == own["b0"]).all()


@pytest.mark.parametrize(
    "case, spreads", [("gaussian", (1 / 4, 0.0)), ("orthogonal", (0.1 / 2**0.5,) * 2)]
)
def test_a_random_start_has_the_spread_of_that_of_peft(case, spreads):
    kind, config, peft = started(case)
    start = kind.init(jax.random.key(0), base()[0].specs, config)
    for path, own in start.items():
        for name, spread in zip("ab", spreads, strict=True):
            for factors in (own, peft[path]):
                np.testing.assert_allclose(np.std(factors[name]), spread, rtol=0.2)
        update = np.matmul(own["a"].reshape(2, -1, 4), own["b"].reshape(2, 4, -1))
        assert np.abs(update).max() < 1e-6


def test_lengths_are_measured_once_a_step_and_get_no_gradient():
    """A step attaches what was measured to every microbatch: the very same leaf."""
    config, adapters = config_of("dora"), factors_of("dora", "final")
    kind, params = find_kind("dora"), base()[1]
    settings = kind.settings(kind.ranks(adapters), config)
    own = {path: params[path] for path in adapters}
    measured = jax.jit(kind.measure)(own, adapters, settings)
    attach = jax.jit(kind.attach)
    close(attach(measured, adapters, settings), attach(own, adapters, settings))
    merged = jax.jit(kind.merge, static_argnums=2)(own, adapters, config)
    for path in adapters:
        spec = base()[0].specs[path]
        whole = np.moveaxis(
            merged[path],
            range(spec.stacked, spec.stacked + spec.n_in),
            range(spec.n_in),
        )
        found = np.linalg.norm(whole.reshape(-1, *whole.shape[spec.n_in :]), axis=0)
        close(found, np.abs(adapters[path]["magnitude"]))

    def norms(factors):
        return kind.measure(own, factors, settings)["embedding.table"].norm.sum()

    slopes = jax.jit(jax.grad(norms))(adapters)
    assert all((x == 0).all() for x in jax.tree.leaves(slopes))


def test_a_step_with_dropout_is_that_of_peft(monkeypatch):
    """The frozen product sees all inputs, and what is added to it those that are left.

    Inputs that PEFT kept stand in the place of keys, and nothing is drawn.
    """
    kind, config, adapters = started("dora_dropout")
    params, given = base()[1], recorded("dora_dropout")
    scales = kind.settings(kind.ranks(adapters), config).scales
    monkeypatch.setattr(jax.random, "bernoulli", lambda kept, share, shape: kept)

    def loss(adapters):
        weights = dict(params)
        for path, own in adapters.items():
            names = [f"kept base_model.model.{MODULES[path].format(i)}" for i in (0, 1)]
            kept = jnp.stack([given[name][None] != 0 for name in names])
            scale, rate = jnp.full(2, scales[path]), jnp.full(2, 0.5)
            weights[path] = kind.attach_matrix(params[path], own, scale, kept, rate)
        return loss_of(weights, given["rows"][0])

    value, slopes = jax.jit(jax.value_and_grad(loss))(adapters)
    np.testing.assert_allclose(value, given["losses"][0], rtol=0, atol=1e-5)
    for path, own in factors_of("dora_dropout", "gradient").items():
        assert own.keys() == {"a", "b", "magnitude"}
        close(slopes[path], own, rtol=1e-4)


@pytest.mark.parametrize(
    "kind, rank, said",
    [
        ("pissa", 33, r"attention.query.kernel cannot .*lora.rank is 33, .*above 32"),
        ("olora", 64, r"of a matrix \[32, 32\]"),
        ("orthogonal", 3, "rank is 3, and .*: make it even"),
    ],
)
def test_a_rank_that_a_start_cannot_have_is_refused(kind, rank, said):
    config = LoRAConfig(kind=kind, rank=rank, targets=LINEAR)
    with pytest.raises(UserError, match=said):
        find_kind(kind).specs(base()[0].specs, config)


def test_kinds_that_start_from_weights_say_so_without_them():
    config = LoRAConfig(kind="dora", targets=LINEAR)
    with pytest.raises(UserError, match="start from the weights"):
        find_kind("dora").init(jax.random.key(0), base()[0].specs, config)


def folder_of(case, folder):
    """The folder that PEFT saved at the end, and its tensors."""
    config = json.loads((GOLDEN / "training" / "configs.json").read_text())[case]
    tensors = {
        name.removeprefix("final "): value
        for name, value in recorded(case).items()
        if name.startswith("final ")
    }
    return write_adapter(folder, tensors, config), tensors


@pytest.mark.parametrize("case", ["rslora", "dora", "dora_layers"])
def test_a_folder_of_peft_is_read_and_written_again(case, tmp_path):
    """The tensors are PEFT's own, by name, shape and value, and so is the product."""
    (model, params), config = base(), config_of(case)
    name, theirs = folder_of(case, tmp_path / "peft")
    adapter = AdapterFolder(name, model.architecture, model.specs)
    found = adapter.lora_config(LoRAConfig())
    assert found.kind == config.kind and not found.rslora
    factors = {path: adapter.factors(path) for path in adapter.ranks}
    jax.tree.map(
        np.testing.assert_array_equal, factors, dict(factors_of(case, "final"))
    )
    merged = find_kind(found.kind).merge(params, factors, found)
    close(merged, find_kind(config.kind).merge(params, factors, config), rtol=1e-6)
    written = plan_adapter(
        model.architecture,
        model.specs,
        adapter.scales,
        lambda path, index: tuple(factors[path][x][index] for x in "ab"),
        fetch_lengths=(lambda path, index: factors[path]["magnitude"][index])
        if config.kind == "dora"
        else None,
    )
    tensors = dict(written.tensors())
    assert {k: x.shape for k, x in theirs.items()} == written.shapes
    for key, value in theirs.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)
    assert written.config.get("use_dora", False) == (config.kind == "dora")
    again = write_adapter(tmp_path / "ours", tensors, written.config)
    own = AdapterFolder(again, model.architecture, model.specs)
    assert own.scales == adapter.scales and own.adapter_kind is adapter.adapter_kind
    if case == "dora_layers":  # Layer 0 stays as it is, bit for bit.
        for path in LINEAR:
            changed = merged[path] != params[path]
            assert [np.any(x) for x in changed] == [False, True]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"use_dora": False}, "a lora_magnitude_vector, and .* does not say use_dora"),
        ("0.self_attn.q_proj.lora_magnitude", "q_proj lacks its lora_magnitude"),
    ],
)
def test_a_damaged_folder_of_dora_is_one_sentence(change, said, tmp_path):
    folder = tmp_path / "peft"
    _, tensors = folder_of("dora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(change, str):
        tensors = {name: x for name, x in tensors.items() if change not in name}
    else:
        config |= change
    write_adapter(folder, tensors, config)
    model = base()[0]
    with pytest.raises(UserError, match=said):
        AdapterFolder(str(folder), model.architecture, model.specs)


def test_embeddings_start_as_those_of_peft():
    (kind, config, peft), specs = started("dora"), base()[0].specs
    start = jax.jit(lambda key, base: kind.init(key, specs, config, base))
    for own in (start(jax.random.key(0), base()[1]), peft):
        table = own["embedding.table"]
        assert not np.any(table["a"])
        np.testing.assert_allclose(np.std(table["b"]), 1.0, rtol=0.2)
        close(table["magnitude"], peft["embedding.table"]["magnitude"])
        assert not np.any(own[LINEAR[0]]["b"])
