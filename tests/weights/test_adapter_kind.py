"""A kind of adapter is one object: this file adds one, and everything else follows.

`ScaledLoRA` trains a scale of each output beside the factors of LoRA. It is registered
here alone, and the real pipeline trains it on a 2x2x2 mesh, resumes it, plans it and
exports it.
"""

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, random_adapters
from jax.sharding import PartitionSpec
from small_run import as_killed, make_small_place, small_config, small_hidden

from research.config.choices import ADAPTER_MODULES
from research.config.run_config import LoRAConfig
from research.core.errors import UserError
from research.formats.base_model import EXPORTED, open_architecture, open_base
from research.formats.load_parameters import load_base
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.plan import planner
from research.plan.planned_devices import parse_device
from research.runs.display_files import read_findings
from research.runs.metrics_file import read_metrics
from research.runs.reopen import reopen
from research.train import start_to_report
from research.weights import parameter_paths, trainable
from research.weights.adapters.lora import LoRA
from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Leaf

STEPS, KILLED = 4, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Leaf):
    """`inner` with each output multiplied by `gain`, `[*stack, *out]`."""

    inner: Leaf
    gain: jax.Array

    @property
    def shape(self):
        return self.inner.shape

    def contract(self, x, n_in, dtype):
        y = contract(x, self.inner, n_in, dtype)
        return y * jnp.expand_dims(self.gain, range(x.ndim - n_in)).astype(dtype)

    def lookup(self, ids, dtype):
        rows = lookup(self.inner, ids, dtype)
        return rows * jnp.expand_dims(self.gain, range(ids.ndim)).astype(dtype)

    def transpose(self):
        return transpose(self.materialize())

    def materialize(self):
        whole, stack = materialize(self.inner), self.inner.scale.ndim
        n_in = whole.ndim - self.gain.ndim
        gain = jnp.expand_dims(self.gain, range(stack, stack + n_in))
        return (whole.astype(jnp.float32) * gain).astype(whole.dtype)


class ScaledLoRA(LoRA):
    name = "scaled"

    def matrix_specs(self, spec, rank):
        first = spec.stacked + spec.n_in
        gain = Spec(
            (*spec.shape[: spec.stacked], *spec.shape[first:]),
            (*spec.axes[: spec.stacked], *spec.axes[first:]),
            n_in=0,
            stacked=spec.stacked,
        )
        return super().matrix_specs(spec, rank) | {"gain": gain}

    def init_matrix(self, key, specs, base):
        gain = jnp.ones(specs["gain"].shape, jnp.float32)
        return super().init_matrix(key, specs, base) | {"gain": gain}

    def attach_matrix(self, base, factors, scale, key, rate):
        low_rank = super().attach_matrix(base, factors, scale, key, rate)
        return Scaled(low_rank, factors["gain"])

    def off_matrix(self, factors, base):
        gain = jnp.ones_like(factors["gain"])
        return super().off_matrix(factors, base) | {"gain": gain}

    def unmerge_matrix(self, merged, adapted):
        n_in = merged.ndim - adapted.gain.ndim
        stack = adapted.inner.scale.ndim
        gain = jnp.expand_dims(adapted.gain, range(stack, stack + n_in))
        plain = merged.astype(jnp.float32) / gain
        return super().unmerge_matrix(plain, adapted.inner).astype(merged.dtype)

    def union(self, specs, configs):
        if len({config.targets for config in configs}) > 1:
            raise UserError("a gain of a matrix that a run does not adapt would train")
        return super().union(specs, configs)


class Crooked(ScaledLoRA):
    """Starts beside its no-op state."""

    name = "crooked"

    def init_matrix(self, key, specs, base):
        start = super().init_matrix(key, specs, base)
        return start | {"gain": start["gain"] * 1.01}


KIND = SCALED = ScaledLoRA()
CROOKED = "tests_crooked_kind"


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTER_MODULES, SCALED.name, __name__)
        patch.setitem(ADAPTER_MODULES, Crooked.name, CROOKED)
        patch.setitem(sys.modules, CROOKED, types.SimpleNamespace(KIND=Crooked()))
        yield


def adapters(kind="scaled", rank=2, targets=("attention", "mlp")):
    return LoRAConfig(kind=kind, rank=rank, targets=targets)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kind")
    make_small_place(folder)
    return folder


def config_for(place, name, **changes):
    return small_config(place, name, STEPS, lora=adapters(**changes))


@pytest.fixture(scope="module")
def trained(place):
    """The run directory of an unbroken run."""
    assert start_to_report.train([config_for(place, "unbroken")]) == 0
    return place / "unbroken"


def final_params(folder):
    return reopen(folder, step=str(STEPS)).params


def test_it_trains_every_factor_and_the_loss_falls(trained):
    losses = [x["loss"] for x in read_metrics(trained) if x["kind"] == "train"]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    for path, factors in final_params(trained).items():
        assert factors.keys() == {"a", "b", "gain"}
        assert np.abs(factors["b"]).max() > 0, path
        assert np.abs(factors["gain"] - 1.0).max() > 1e-3, path


def test_the_doctor_proves_its_start_by_its_own_no_op_state(place, trained):
    found = {finding.name: finding for finding in read_findings(trained)}
    assert found["scaled at step 0"].ok
    assert found["scaled at step 0"].numbers["differing"] == 0
    with pytest.raises(UserError, match=r"crooked at step 0: .*\n.*exact no-op"):
        start_to_report.train([config_for(place, "crooked", kind="crooked")])


def test_a_broken_run_resumes_bit_for_bit(place, trained):
    as_killed(trained, KILLED, place / "broken")
    assert start_to_report.train([config_for(place, "broken")]) == 0
    history = json.loads((place / "broken" / "run.json").read_text())
    assert [start["first"] for start in history["starts"]] == [0, KILLED]
    for found, expected in zip(
        *map(jax.tree.leaves, (final_params(place / "broken"), final_params(trained))),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_merged_and_exported_weights_compute_what_the_adapters_do(trained):
    run = reopen(trained)
    merged = SCALED.merge(run.frozen, run.params, run.config.lora)
    adapted = small_hidden(run.model, run.weights)
    close(small_hidden(run.model, merged), adapted)
    assert np.abs(adapted - small_hidden(run.model, run.frozen)).max() > 1e-2
    restored = SCALED.unmerge(merged, run.params, run.config.lora)
    close(restored, run.frozen)
    exported = open_base(str(trained / EXPORTED))
    written = load_base(exported, run.model, run.mesh, jnp.float32, 0)
    close(small_hidden(run.model, written), adapted)


def test_it_is_counted_and_planned(place, trained):
    config = config_for(place, "planned")
    architecture = open_architecture(config.model.init_from, 1.0)
    plan = planner.plan_estimate(config, architecture, parse_device("h100:8"))
    specs = Model(architecture).specs
    lora = config_for(place, "plain", kind="lora")
    plain = trainable.make(lora.trainable, lora.model, lora.lora, specs)
    gains = 0
    for path in plain.specs:
        spec = specs[path]
        out = math.prod(spec.shape[spec.stacked + spec.n_in :])
        gains += math.prod(spec.shape[: spec.stacked]) * out
    expected = parameter_paths.count(plain.specs) + gains
    assert plan.trained == parameter_paths.count(final_params(trained)) == expected
    assert plan.frozen == parameter_paths.count(specs)


def test_its_factors_lie_over_the_mesh_as_their_matrix_does(place, trained):
    mesh = meshes.make_mesh(config_for(place, "unbroken").mesh)
    found = reopen(trained, mesh).params["layers.attention.query.kernel"]
    assert found["gain"].sharding.spec == PartitionSpec(None, "tensor", None)
    assert found["a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert found["gain"].addressable_shards[0].data.size * 2 == found["gain"].size


def test_padding_to_another_rank_changes_no_output(place):
    config = adapters()
    specs = Model(open_architecture(str(place / "model"), 1.0)).specs
    wide = SCALED.union(specs, [config, adapters(rank=5)])
    own = random_adapters(SCALED.specs(specs, config))
    settings = SCALED.settings(dict.fromkeys(own, 2), config)
    padded = SCALED.pad(own, wide)
    assert {factors["a"].shape[-1] for factors in padded.values()} == {5}
    rng = np.random.default_rng(0)
    base = {path: jnp.float32(rng.normal(size=specs[path].shape)) for path in own}
    attached = SCALED.attach(base, own, settings)
    for path, leaf in SCALED.attach(base, padded, settings).items():
        close(materialize(leaf), materialize(attached[path]))
    with pytest.raises(UserError, match="does not adapt"):
        SCALED.union(specs, [config, adapters(targets=("mlp",))])


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'scalde'.*lora, .*did you mean 'scaled'\?"):
        config_for(Path(), "other", kind="scalde")
