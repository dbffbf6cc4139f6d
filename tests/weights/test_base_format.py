"""A format of frozen weights is one object: this file adds one of several arrays.

`Int8` keeps a matrix as one byte a weight and a scale for each output. Adapters train
over it through the real pipeline on a 2x2x2 mesh, and the run is planned, reopened and
exported, with no edit elsewhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from jax.sharding import PartitionSpec
from small_run import make_small_place, small_config, small_hidden

from research.config.choices import BASE_FORMAT_MODULES
from research.core.errors import UserError
from research.formats.base_model import EXPORTED, open_architecture, open_base
from research.formats.load_parameters import load_base, load_frozen
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.plan import planner
from research.plan.planned_devices import parse_device
from research.runs.display_files import read_findings
from research.runs.reopen import reopen
from research.train import start_to_report
from research.weights import parameter_paths, trainable
from research.weights.contraction import contract, lookup, transpose
from research.weights.representations.leaf import Leaf

NAME, STEPS = "int8", 2
MATRIX = "layers.attention.output.kernel"


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


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASE_FORMAT_MODULES, NAME, __name__)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("format")
    make_small_place(folder)
    return folder


def config_for(place, name="run", base_format=NAME, **changes):
    model = {"base_format": base_format}
    return small_config(place, name, STEPS, model, **changes)


@pytest.fixture(scope="module")
def trained(place):
    assert start_to_report.train([config_for(place)]) == 0
    return place / "run"


def test_a_matrix_is_stored_as_it_loads_and_lies_as_its_axes_say(place):
    config = config_for(place)
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


def test_adapters_train_over_it_from_an_exact_no_op(trained):
    found = {finding.name: finding for finding in read_findings(trained)}
    assert found["lora at step 0"].ok
    assert found["lora at step 0"].numbers["differing"] == 0
    run = reopen(trained)
    assert isinstance(run.frozen[MATRIX], Int8)
    assert all(np.abs(factors["b"]).max() > 0 for factors in run.params.values())


def test_an_export_holds_what_the_adapters_over_it_compute(trained):
    run = reopen(trained)
    exported = open_base(str(trained / EXPORTED))
    written = load_base(exported, run.model, run.mesh, jnp.float32, 0)
    close(small_hidden(run.model, written), small_hidden(run.model, run.weights))


def test_a_plan_counts_its_weights_and_its_bytes(place):
    target = parse_device("h100:8")
    plans = []
    for name in (NAME, "plain"):
        config = config_for(place, base_format=name)
        architecture = open_architecture(config.model.init_from, 1.0)
        plans.append(planner.plan_estimate(config, architecture, target))
    small, plain = plans
    assert small.frozen == plain.frozen and small.trained == plain.trained
    assert small.memory.frozen < 0.35 * plain.memory.frozen


def test_trained_weights_have_no_format(place):
    config = config_for(place, trainable="full")
    with pytest.raises(UserError, match=r"base_format is 'int8'.*use.*plain"):
        trainable.make(config.trainable, config.model, config.lora, {})
