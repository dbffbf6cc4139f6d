"""Each check of the doctor fails when what it looks for is there."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, random_params

from research.config.choices import ADAPTER_MODULES
from research.config.run_config import Config, LoRAConfig, MeshConfig, ModelConfig
from research.core.errors import UserError
from research.data.instructions.instruction_dataset import PackedDocuments
from research.data.instructions.packing import TokenizedDocument
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tasks import findings
from research.tasks.findings import Finding
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train import doctor
from research.train.step import optimizers, train_step
from research.weights import trainable
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.contraction import contract
from research.weights.parameter_spec import Spec
from research.weights.representations.lost_in_codes import LostInCodes

STOP = 7


def split(trained, last=STOP):
    ids = np.array([1, 2, 3, 4, last], np.int32)
    documents = [TokenizedDocument(ids, np.array(trained, bool), 0)] * 3
    return PackedDocuments(documents, [[0, 1], [2]], 10)


def count(split):
    return findings.count_mask([split.batch(split.rows)], frozenset({STOP}))


def test_a_sound_mask_is_counted_from_the_batches():
    found = count(split([0, 0, 0, 1, 1]))
    assert found == findings.MaskCount(real=12, trained=6, documents=3, ends=3)


@pytest.mark.parametrize("mask", [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
def test_an_untrained_end_is_seen(mask):
    assert count(split(mask)).ends == 0


def test_another_last_token_is_seen():
    found = count(split([0, 0, 0, 1, 1], last=5))
    assert found.ends == 0


def test_masks_of_all_or_nothing_are_seen():
    for value in (0, 1):
        found = count(split([value] * 5))
        assert found.trained in (0, found.real)


class TwoMatrices:
    """As much of a model as the doctor asks for; it compiles in no time."""

    architecture = types.SimpleNamespace(vocab=8, experts=None)
    options = types.SimpleNamespace(dtype=jnp.dtype("float32"))
    specs = types.MappingProxyType(
        {"layers.w": Spec((2, 8, 6), ("layers", "embed", "mlp"), stacked=1)}
    )

    def hidden(self, weights, tokens, positions, segments):
        rows = jax.nn.one_hot(tokens, 8)
        multiply = jax.vmap(lambda w: contract(rows, w))
        return jnp.sum(multiply(weights["layers.w"]), 0)


OVER_CODES = ("loftq", "qera")


def make_job(kind, model, arrays=()):
    """A definition, a base and adapters at their start; `arrays` are in no codes."""
    coded = {}
    if kind in OVER_CODES:
        coded = {
            "quantize": "int8",
            "quantize_paths": tuple(f"{x}=none" for x in arrays),
        }
    lora = LoRAConfig(rank=2, kind=kind, targets=("layers",))
    config = Config(lora=lora, model=ModelConfig(dtype="float32", **coded))
    mesh = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    parts = trainable.make(config.trainable, config.model, config.lora, model.specs)
    definition = train_step.StepDefinition(
        model, parts, optimizers.make_optimizer(config.optim, 2, parts.specs), mesh, 8
    )
    weights = random_params(model.specs)
    base = {p: parts.store(p, x, model.specs[p]) for p, x in weights.items()}
    inputs = {
        path: InputDirections(*starts_of(factors["a"]))
        for path, factors in (parts.specs if kind in ("eva", "qera") else {}).items()
    }
    start = base
    if kind in OVER_CODES:
        start = {path: lost(weights, base, path) for path in parts.specs}
    return definition, base, jax.jit(parts.init)(jax.random.key(0), start, inputs)


def starts_of(a):
    """The first axes, and what each explains; as if inputs of a matrix varied so."""
    stack, inputs, rank = a.as_matrix.shape
    shares = np.geomspace(0.5, 0.1, stack * rank, dtype=np.float32)
    return np.tile(np.eye(inputs, rank, dtype=np.float32), (stack, 1, 1)), (
        shares.reshape(rank, stack).T
    )


def lost(weights, base, path):
    return LostInCodes(weights[path], base[path])


@pytest.fixture(scope="module")
def lora_job():
    return make_job("lora", Model(TINY))


# The base model as its files are open.
BASE = types.SimpleNamespace(
    name="b",
    fingerprint="f",
    tokenizer=types.SimpleNamespace(vocab_size=1, fingerprint="t"),
)


def failed(*args):
    return [f.name for f in doctor.examine_model(BASE, *args) if not f.ok]


def test_fresh_adapters_pass(lora_job):
    definition, base, adapters = lora_job
    assert failed(definition, train_step.init_state(definition, adapters), base) == []


def test_a_start_from_codes_passes_where_the_first_target_has_none(monkeypatch):
    model = Model(TINY)
    definition, base, adapters = make_job("loftq", model, arrays=["key"])
    weights = random_params(model.specs)
    monkeypatch.setattr(
        doctor,
        "lost_in_codes",
        lambda definition, files, path, codes: LostInCodes(weights[path], codes),
    )
    assert min(adapters) == "layers.attention.key.kernel"
    assert not definition.trainable.is_in_codes(min(adapters))
    state = train_step.init_state(definition, adapters)
    assert failed(definition, state, base) == []


# An array of each kind that may not start elsewhere.
MOVED = {
    "dora": "magnitude", "pissa": "b0", "olora": "a", "vera": "lambda_b", "lora": "b",
    "gaussian": "b", "orthogonal": "b", "eva": "b", "loftq": "b",
    "qera": "b",
}  # fmt: skip


def test_every_kind_is_among_them():
    assert MOVED.keys() == ADAPTER_MODULES.keys()


@pytest.mark.parametrize("kind", MOVED)
def test_each_kind_proves_its_start(kind, monkeypatch):
    definition, base, adapters = make_job(kind, TwoMatrices())
    if kind in OVER_CODES:  # There is no file.
        weights = random_params(definition.model.specs)
        monkeypatch.setattr(
            doctor, "lost_in_codes", lambda *given: lost(weights, base, given[2])
        )
    state = train_step.init_state(definition, adapters)
    assert failed(definition, state, base) == []
    path, name = min(adapters), MOVED[kind]
    odd = adapters | {path: adapters[path] | {name: adapters[path][name] + 0.1}}
    state = train_step.init_state(definition, odd)
    assert failed(definition, state, base) == [f"{kind} at step 0"]


def test_adapters_that_change_the_base_model_are_seen(lora_job):
    definition, base, adapters = lora_job
    path = next(iter(adapters))
    moved = adapters | {path: adapters[path] | {"b": adapters[path]["b"] + 0.1}}
    state = train_step.init_state(definition, moved)
    assert failed(definition, state, base) == ["lora at step 0"]
    # Those of another tool may be no no-op; without them it is the base model.
    assert failed(definition, state, base, "folder") == []


def test_adapters_over_other_weights_are_seen(lora_job):
    """No bit tells: with and without adapters the program is the same."""
    definition, base, adapters = lora_job

    right = definition.trainable.forward

    def shifted(params, frozen, key):
        return right(params, jax.tree.map(lambda w: 1.01 * w, frozen), key)

    wrong = dataclasses.replace(definition.trainable, forward=shifted)
    definition = dataclasses.replace(definition, trainable=wrong)
    assert failed(definition, train_step.init_state(definition, adapters), base) == [
        "lora at step 0"
    ]


def test_more_trained_than_adapters_is_seen(lora_job):
    definition, base, adapters = lora_job
    path = next(iter(adapters))
    more = adapters | {path: adapters[path] | {"w": jnp.zeros(3)}}
    state = dataclasses.replace(
        train_step.init_state(definition, adapters), params=more
    )
    assert failed(definition, state, base) == ["frozen weights"]


def test_a_failed_finding_stops_the_run_with_its_remedy():
    found = [Finding("a", "fine"), Finding("b", "odd", False, "fix it")]
    with pytest.raises(UserError, match=r"b: odd\n    fix it"):
        doctor.require_healthy(doctor.Examination(found, []))


def test_the_size_of_a_product_with_the_head_is_stated(lora_job):
    objective = CrossEntropy(1, 0, mesh=lora_job[0].mesh)
    definition = dataclasses.replace(lora_job[0], objective=objective)
    found = doctor._examine_chunk(definition)
    assert [f.numbers for f in found] == [{"positions": 128}]
    assert found[0].text.startswith("128 positions")
    other = dataclasses.replace(definition, objective=None)
    assert doctor._examine_chunk(other) == []


def test_weights_to_start_from_that_are_not_finite_are_seen(lora_job):
    whole = dataclasses.replace(lora_job[0].trainable, kind=None)
    definition = dataclasses.replace(lora_job[0], trainable=whole)
    for value, remedies in ((2.0, []), (math.nan, ["w"])):
        params = {"u": jnp.ones(2), "w": jnp.array([1.0, value])}
        state = train_step.TrainState(jnp.int32(0), params, ())
        findings = doctor.examine_model(BASE, definition, state, {})
        said = [f.remedy.rpartition("not finite: ")[2] for f in findings if not f.ok]
        assert said == remedies
