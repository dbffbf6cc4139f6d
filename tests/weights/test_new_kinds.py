"""A kind of adapter is one object, and so is a format of frozen weights.

This file adds one of each: `ScaledLoRA` trains a scale of each output beside the
factors of LoRA, and `Int8` keeps a matrix as one byte a weight and a scale for each
output. They are registered here alone. The real pipeline trains the one over the other
on a 2x2x2 mesh, resumes the run, plans it and exports it, with no edit elsewhere.
"""

import dataclasses
import gc
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak, random_adapters
from jax.sharding import PartitionSpec
from small_run import (
    as_killed,
    make_small_place,
    one_device,
    small_config,
    small_hidden,
)

from research.config.choices import ADAPTER_MODULES, BASE_FORMAT_MODULES
from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.evaluate.measuring.ask_models import open_group, share_bases
from research.evaluate.measuring.evaluated_models import find_models
from research.formats.base_model import open_architecture, open_base
from research.formats.export_names import EXPORTED
from research.formats.load_parameters import load_base, load_frozen
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.plan import planner
from research.plan.planned_devices import parse_device
from research.runs.answering.int8_base import with_int8
from research.runs.answering.open_for_answering import (
    find_adapters,
    open_for_answering,
)
from research.runs.answering.run_addresses import run_addresses
from research.runs.display_files import read_findings
from research.runs.lineage.base_of_run import RunTensors
from research.runs.metrics_file import read_metrics
from research.runs.reopen import find_run, reopen
from research.train import start_to_report
from research.train.metrics import metrics_log
from research.weights import parameter_paths, trainable
from research.weights.adapters.adapter_registry import find_kind
from research.weights.adapters.lora import LoRA
from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.parameter_spec import Spec
from research.weights.quantized.int8_weights import Int8Matrix
from research.weights.representations.adapter_bank import AdapterBank
from research.weights.representations.leaf import Leaf

STEPS, KILLED = 4, 2
MATRIX = "layers.attention.output.kernel"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Leaf):
    """`inner` with each output multiplied by 1 + `stretch`, `[*stack, *out]`."""

    inner: Leaf
    stretch: jax.Array

    @property
    def shape(self):
        return self.inner.shape

    def contract(self, x, n_in, dtype):
        y = contract(x, self.inner, n_in, dtype)
        gain = jnp.expand_dims(1 + self.stretch, range(x.ndim - n_in))
        return y * gain.astype(dtype)

    def lookup(self, ids, dtype):
        rows = lookup(self.inner, ids, dtype)
        gain = jnp.expand_dims(1 + self.stretch, range(ids.ndim))
        return rows * gain.astype(dtype)

    def transpose(self):
        return transpose(self.materialize())

    def materialize(self):
        whole, stack = materialize(self.inner), self.inner.scale.ndim
        n_in = whole.ndim - self.stretch.ndim
        gain = jnp.expand_dims(1 + self.stretch, range(stack, stack + n_in))
        return (whole.astype(jnp.float32) * gain).astype(whole.dtype)


class ScaledLoRA(LoRA):
    name = "scaled"

    def matrix_specs(self, spec, rank):
        first = spec.stacked + spec.n_in
        stretch = Spec(
            (*spec.shape[: spec.stacked], *spec.shape[first:]),
            (*spec.axes[: spec.stacked], *spec.axes[first:]),
            n_in=0,
            stacked=spec.stacked,
        )
        return super().matrix_specs(spec, rank) | {"stretch": stretch}

    def init_matrix(self, key, specs, base, scale):
        stretch = jnp.zeros(specs["stretch"].shape, jnp.float32)
        return super().init_matrix(key, specs, base, scale) | {"stretch": stretch}

    def attach_matrix(self, base, factors, scale, key, rate):
        low_rank = super().attach_matrix(base, factors, scale, key, rate)
        return Scaled(low_rank, factors["stretch"])

    def unmerge_matrix(self, merged, adapted):
        n_in = merged.ndim - adapted.stretch.ndim
        stack = adapted.inner.scale.ndim
        gain = jnp.expand_dims(1 + adapted.stretch, range(stack, stack + n_in))
        plain = merged.astype(jnp.float32) / gain
        return super().unmerge_matrix(plain, adapted.inner).astype(merged.dtype)


class Crooked(ScaledLoRA):
    """Starts beside its no-op state."""

    name = "crooked"

    def init_matrix(self, key, specs, base, scale):
        start = super().init_matrix(key, specs, base, scale)
        return start | {"stretch": start["stretch"] + 0.01}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Leaf):
    """`codes * scales`: `[*stack, *in, *out]` int8, `[*stack, 1.., *out]` float32."""

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self):
        return tuple(self.codes.shape)

    def contract(self, x, n_in, dtype):
        return contract(x, self.materialize(), n_in, dtype)

    def lookup(self, ids, dtype):
        return lookup(self.materialize(), ids, dtype)

    def transpose(self):
        return transpose(self.materialize())

    def materialize(self):
        return self.codes * self.scales


class Int8Format:
    def specs(self, spec):
        if not spec.n_in:
            return spec
        inputs = slice(spec.stacked, spec.stacked + spec.n_in)
        shape, axes = list(spec.shape), list(spec.axes)
        shape[inputs], axes[inputs] = [1] * spec.n_in, ["norm"] * spec.n_in
        return Int8(
            codes=dataclasses.replace(spec, dtype="int8"),
            scales=dataclasses.replace(
                spec, shape=tuple(shape), axes=tuple(axes), dtype="float32"
            ),
        )

    def store(self, weight, spec):
        if not spec.n_in:
            return weight
        inputs = tuple(range(spec.stacked, spec.stacked + spec.n_in))
        wide = weight.astype(jnp.float32)
        scales = jnp.max(jnp.abs(wide), inputs, keepdims=True) / 127
        return Int8(jnp.round(wide / scales).astype(jnp.int8), scales)


FORMAT = Int8Format()


KIND = SCALED = ScaledLoRA()
CROOKED = "tests_crooked_kind"


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTER_MODULES, SCALED.name, __name__)
        patch.setitem(ADAPTER_MODULES, Crooked.name, CROOKED)
        patch.setitem(sys.modules, CROOKED, types.SimpleNamespace(KIND=Crooked()))
        patch.setitem(BASE_FORMAT_MODULES, "codes", __name__)
        yield


# Matrices of two input axes, of two output axes, and of one each.
FEW = ("attention.output", "attention.query", "mlp.down")


def adapters(kind="scaled", rank=2, targets=FEW):
    """With the scales of norms, which both formats keep, trained whole beside them."""
    return LoRAConfig(
        kind=kind, rank=rank, dropout=0.0, targets=targets, full=("norms",)
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    make_small_place(folder)
    return folder


def config_for(small, name, quantize="codes", **changes):
    model = {"quantize": quantize}
    return small_config(small, name, STEPS, model, lora=adapters(**changes))


def train(*arguments, **changes):
    """Trains a config of `config_for`, and returns the run directory."""
    config = config_for(*arguments, **changes)
    assert start_to_report.train([config]) == 0
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def trained(small):
    """The run directory of an unbroken run."""
    return train(small, "unbroken")


@pytest.fixture(
    scope="module",
    params=[
        ("scaled", "codes"),
        in_soak(("scaled", "none")),
        in_soak(("lora", "codes")),
        in_soak(("dora", "codes")),
        in_soak(("pissa", "codes")),
    ],
    ids="-".join,
)
def alone_or_together(request, small):
    """The run of both, and in the soak one of each with what is there anyway."""
    kind, quantize = request.param
    if kind == "scaled" and quantize == "codes":
        return request.getfixturevalue("trained")
    return train(small, f"{kind}-{quantize}", quantize, kind=kind)


def final_params(folder):
    return reopen(folder, step=str(STEPS)).params


# -- both, in one run ------------------------------------------------------------------


def test_it_trains_every_factor_and_the_loss_falls(trained):
    losses = [x["loss"] for x in read_metrics(trained) if x["kind"] == "train"]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    run = reopen(trained)
    assert isinstance(run.frozen[MATRIX], Int8)
    for path, factors in run.trainable.adapters(run.params).items():
        assert factors.keys() == {"a", "b", "stretch"}
        assert np.abs(factors["b"]).max() > 0, path
        assert np.abs(factors["stretch"]).max() > 1e-3, path
    assert len(run.trainable.full) == 3
    for path in run.trainable.full:
        assert np.abs(run.params[path] - run.frozen[path]).max() > 1e-3, path


def test_the_doctor_proves_its_start_by_its_own_no_op_state(small, trained):
    found = {finding.name: finding for finding in read_findings(trained)}
    assert found["scaled at step 0"].ok
    assert found["scaled at step 0"].numbers["differing"] == 0
    whole = found["whole parameters"]
    assert whole.text.startswith(
        "320 trained in float32 under 3 paths\n  final_norm.sc"
    )
    assert whole.numbers == {"scalars": 320, "paths": 3}
    run, numbers = reopen(trained), found["parameters"].numbers
    factors = parameter_paths.count(run.trainable.adapters(run.params))
    assert numbers["trained"] == factors + 320
    assert numbers["frozen"] == parameter_paths.count(run.frozen) - 320
    with pytest.raises(UserError, match=r"crooked at step 0: .*\n.*exact no-op"):
        train(small, "crooked", kind="crooked")


def test_a_killed_run_resumes_bit_for_bit(small, trained):
    as_killed(trained, KILLED, small / "killed")
    check_resumed(train(small, "killed"), trained, KILLED)


@pytest.mark.soak
def test_a_run_that_crashed_in_a_step_resumes_bit_for_bit(small, trained, monkeypatch):
    def crash(log, number, *rest, write=metrics_log.StepLog.__call__):
        if number == STEPS - 1:
            raise RuntimeError("the power is off")
        return write(log, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_log.StepLog, "__call__", crash)
        with pytest.raises(RuntimeError, match="power"):
            train(small, "crashed")
    gc.collect()  # Frames of the traceback hold the lock of the run directory.
    check_resumed(train(small, "crashed"), trained, KILLED)


def check_resumed(folder, unbroken, first):
    history = json.loads((folder / "run.json").read_text())
    assert [start["first"] for start in history["starts"]] == [0, first]
    for found, expected in zip(
        *map(jax.tree.leaves, (final_params(folder), final_params(unbroken))),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_merged_and_exported_weights_compute_what_the_adapters_do(alone_or_together):
    run = reopen(alone_or_together)
    kind = find_kind(run.config.lora.kind)
    factors = run.trainable.adapters(run.params)
    whole = {path: run.params[path] for path in run.trainable.full}
    merged = kind.merge(run.frozen, factors, run.config.lora)
    adapted = small_hidden(run.model, run.weights)
    close(small_hidden(run.model, merged | whole), adapted)
    assert np.abs(adapted - small_hidden(run.model, run.frozen)).max() > 1e-2
    assert np.abs(adapted - small_hidden(run.model, merged)).max() > 1e-3
    if kind.name == "dora":
        with pytest.raises(UserError, match="cannot be taken out"):
            kind.unmerge(merged, factors, run.config.lora)
    else:
        restored = kind.unmerge(merged, factors, run.config.lora)
        close(restored, {p: materialize(leaf) for p, leaf in run.frozen.items()})
    exported = open_base(str(alone_or_together / EXPORTED))
    written = load_base(exported, run.model, run.mesh, jnp.float32, 0)
    close(small_hidden(run.model, written), adapted)


def test_with_whole_parameters_it_is_a_base_model_itself(small, trained):
    """It answers alone, as others share a base in which norms are not trained."""
    run, mesh = reopen(trained, one_device()), one_device()
    found = open_for_answering([str(trained)], mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, found.params, run.weights)
    assert not isinstance(found.params[MATRIX], AdapterBank)
    few = {x: found.params[x] for x in (MATRIX, "head.kernel")}
    coded = with_int8(few, found.model, mesh)
    assert isinstance(coded[MATRIX], Int8Matrix)
    start, base = str(small / "model"), open_base(str(small / "model"))
    with pytest.raises(UserError, match=r"whole \(config.lora.full\), so it is a base"):
        open_for_answering([str(trained)], model=start)
    with pytest.raises(UserError, match=r"not an adapter to .*: serve it by itself"):
        find_adapters(*run_addresses([str(trained)]), base)
    ours = find_models([str(trained)]).models
    assert [[x.name for x in group] for group in share_bases(ours)] == [
        ["base"], ["tuned"],
    ]  # fmt: skip
    for each, weights in zip(ours, (run.frozen, run.weights), strict=True):
        jax.tree.map(np.testing.assert_array_equal, open_group([each]).params, weights)
    # Adapters to it lie over what it has trained.
    tensors = RunTensors(find_run(trained), STEPS, mesh)
    written = open_base(str(trained / EXPORTED)).tensors
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        np.testing.assert_array_equal(tensors.read(name), written.read(name))
        assert np.abs(tensors.read(name) - 1.0).max() > 1e-3


def test_it_is_counted_and_planned(small, trained):
    architecture = open_architecture(str(small / "model"), 1.0)
    specs = Model(architecture).specs

    def plan(quantize):
        config = config_for(small, "planned", quantize)
        return planner.plan_estimate(config, architecture, parse_device("h100:8"))

    coded, plain = plan("codes"), plan("none")
    lora = config_for(small, "lora", "none", kind="lora")
    without = trainable.make(lora.trainable, lora.model, lora.lora, specs)
    stretches = 0
    for path in without.adapters(without.specs):
        spec = specs[path]
        out = math.prod(spec.shape[spec.stacked + spec.n_in :])
        stretches += math.prod(spec.shape[: spec.stacked]) * out
    expected = parameter_paths.count(without.specs) + stretches
    assert coded.trained == parameter_paths.count(final_params(trained)) == expected
    assert coded.trained == plain.trained
    whole = parameter_paths.count([specs[path] for path in without.full])
    assert coded.frozen == plain.frozen == parameter_paths.count(specs) - whole
    assert coded.memory.frozen < 0.35 * plain.memory.frozen


# -- the adapter -----------------------------------------------------------------------


def test_its_factors_lie_over_the_mesh_as_their_matrix_does(small, trained):
    mesh = meshes.make_mesh(config_for(small, "unbroken").mesh)
    found = reopen(trained, mesh).params["layers.attention.query.kernel"]
    assert found["stretch"].sharding.spec == PartitionSpec(None, "tensor", None)
    assert found["a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    part = found["stretch"].addressable_shards[0].data
    assert part.size * 2 == found["stretch"].size


def test_padding_to_another_rank_changes_no_output(small):
    config = adapters(targets=("attention", "mlp"))
    specs = Model(open_architecture(str(small / "model"), 1.0)).specs
    own = random_adapters(SCALED.specs(specs, config))
    ranks = SCALED.ranks(own)
    wide = SCALED.union(specs, [ranks, dict.fromkeys(ranks, 5)])
    settings = SCALED.settings(dict.fromkeys(own, 2), config)
    padded = SCALED.pad(own, wide)
    assert {factors["a"].shape[-1] for factors in padded.values()} == {5}
    rng = np.random.default_rng(0)
    base = {path: jnp.float32(rng.normal(size=specs[path].shape)) for path in own}
    attached = SCALED.attach(base, own, settings)
    for path, leaf in SCALED.attach(base, padded, settings).items():
        close(materialize(leaf), materialize(attached[path]))


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'scalde'.*lora, .*did you mean 'scaled'\?"):
        config_for(Path(), "other", kind="scalde")


# -- the format ------------------------------------------------------------------------


def test_a_matrix_is_stored_as_it_loads_and_lies_as_its_axes_say(small):
    config = config_for(small, "stored")
    base = open_base(config.model.init_from)
    model, mesh = Model(base.architecture), meshes.make_mesh(config.mesh)
    split = trainable.make(config.trainable, config.model, config.lora, model.specs)
    frozen = load_frozen(base, model, mesh, split, 0)
    plain = load_base(base, model, mesh, jnp.float32, 0)
    leaf = frozen[MATRIX]
    assert (leaf.codes.dtype, leaf.scales.dtype) == (jnp.int8, jnp.float32)
    assert leaf.codes.sharding.spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert leaf.scales.sharding.spec == PartitionSpec(None, None, None, "fsdp")
    step = np.abs(plain[MATRIX]).max((1, 2), keepdims=True) / 127
    assert (np.abs(leaf.materialize() - plain[MATRIX]) <= 0.51 * step).all()
    assert parameter_paths.count(frozen) == parameter_paths.count(plain)
    assert parameter_paths.nbytes(frozen) < 0.3 * parameter_paths.nbytes(plain)


def test_trained_weights_have_no_format(small):
    config = config_for(small, "full")
    with pytest.raises(UserError, match=r"quantize is 'codes': codes do not .*none"):
        dataclasses.replace(config, trainable="full")
