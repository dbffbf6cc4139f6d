"""The measures of the proof of an export, over which devices and rows."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported_models import tiny_export, tiny_rows, with_adapters
from free_ports import free_port
from helpers import TINY, close, in_soak, mesh_sizes, random_adapters
from switch_models import NAMES, SWITCHES

from research.config.choices import EXPORT_FORMATS
from research.config.knob_groups import LoRAConfig
from research.core.errors import ParityError, UserError
from research.formats.architecture_parity import differences, excused
from research.formats.export_format import ExportOptions, find_format
from research.formats.huggingface.huggingface_weights import read_hf_config
from research.formats.proof import same_model
from research.formats.proof.logit_parity import prove
from research.formats.proof.parity import Parity
from research.formats.proof.proof_tokens import ProofRows
from research.formats.proof.stored_numbers import (
    Axes,
    StoredNumbers,
    half_step,
    rounded,
)
from research.formats.proof.weight_parity import compare_numbers, vocabulary_rows
from research.models.architecture import Experts
from research.models.families.family_registry import from_hf_config, to_hf_config
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.weights.adapters.adapter_registry import find_kind
from research.weights.contraction import materialize
from research.weights.parameter_spec import Spec
from research.weights.representations.low_rank import LowRank
from research.weights.representations.weight_decomposed import WeightDecomposed

QUERY = "layers.attention.query.kernel"


# -- numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_rounding_is_that_of_the_formats(kind):
    """The bound is met by what their library stores, and barely."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 8, 3, 64)).astype(np.float32)
    values[0, 0, 0, :4] = [3.0, -3.0, 1e-7, 0.0]  # two that are the largest
    values[1, 1, 1] = 0
    values[1, 2] *= 1e-4  # scales that float16 has few bits for
    numbers, axes = StoredNumbers(kind), Axes(1, 1)
    own, step = (np.array(f(values, numbers, axes)) for f in (rounded, half_step))
    if kind.startswith("q"):
        code = gguf.GGMLQuantizationType[kind.upper()]
        rows = values.reshape(-1, 32)
        stored = gguf.dequantize(gguf.quantize(rows, code), code).reshape(values.shape)
    else:
        stored = values.astype(jnp.dtype(kind)).astype(np.float32)
    np.testing.assert_allclose(own.astype(np.float32), stored, rtol=1e-6)
    apart = np.abs(stored - values)
    assert np.all(apart <= step * (1 + 1e-5)) and apart.max() > 0.9 * step.min()
    assert np.mean(apart / np.maximum(step, 1e-20)) > 0.3


def test_rows_of_a_file_may_be_inputs():
    values = np.random.default_rng(1).normal(size=(2, 32, 2, 24)).astype(np.float32)
    by_inputs = StoredNumbers("q8_0", by_inputs=True)
    found = rounded(values.reshape(2, 32, 2, 24), by_inputs, Axes(1, 1))
    across = values.reshape(2, 32, 48).swapaxes(1, 2)
    expected = rounded(across, StoredNumbers("q8_0"), Axes(1, 1)).swapaxes(1, 2)
    np.testing.assert_array_equal(found.reshape(2, 32, 48), expected)


@pytest.mark.parametrize("kind", ["bfloat16", "q4_0"])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5])
def test_what_is_left_of_a_small_update_is_known_and_a_lost_one_is_found(kind, size):
    """Rounding may drop an update; a file of the base model alone is another thing."""
    rng = np.random.default_rng(3)
    base, a, b = (rng.normal(size=x) for x in ((1, 512, 64), (1, 512, 4), (1, 4, 64)))
    base = np.float32(base).astype(jnp.bfloat16)
    a, b = jnp.float32(a), jnp.float32(b * size)
    leaf = LowRank(base.astype(np.float32), a, b, jnp.ones(1))
    numbers, axes = StoredNumbers(kind), Axes(1, 1)

    def measure(value):
        found = rounded(value, numbers, axes)
        return compare_numbers(leaf, None, found, None, numbers, axes)

    right, lost = measure(leaf.materialize()), measure(leaf.base)
    assert right["share"] <= 1 < lost["share"]
    kept = float(right["kept"] / right["size"])
    if kind == "bfloat16":  # The base is in bfloat16 itself.
        low, high = {1e-2: (0.95, 1.05), 1e-3: (0.5, 0.95), 1e-5: (0, 0.3)}[size]
        assert low < kept < high


def test_an_update_may_be_the_difference_of_two_products():
    """PiSSA and OLoRA take their first factors off the base model."""
    rng = np.random.default_rng(3)
    base, a, b = (rng.normal(size=x) for x in ((1, 32, 8), (1, 32, 2), (1, 2, 8)))
    base, a, b = map(jnp.float32, (base, a, b))
    inner = LowRank(base, -a, b, jnp.ones(1))
    leaf = LowRank(inner, a * 1.01, b, jnp.ones(1))
    numbers = StoredNumbers("float32", is_update=True)
    for found, right in ((0.01 * a @ b, True), (1.01 * a @ b, False)):
        sums = compare_numbers(leaf, base, found, None, numbers, Axes(1, 1))
        assert (sums["share"] <= 1) == right


def test_numbers_that_lose_what_was_trained_are_named():
    whole = Parity(
        rows="x", tokens=1, numbers="bfloat16", architecture=(), weights=0.5, worst="w",
        update=None, kept=0.99, least_kept="w", logits=0, changed=0, largest=0, kl=0,
        largest_kl=0, agreement=1,
    )  # fmt: skip
    assert not whole.faults() and not whole.warning()
    lost = dataclasses.replace(whole, kept=0.1)
    assert "bfloat16 leaves 10% of what the adapters add" in lost.warning()
    moved = dataclasses.replace(whole, kept=None, update=0.2)
    assert "moves what the adapters add to a matrix by 20%" in moved.warning()
    assert "float32" in lost.warning() and "float32" in moved.warning()
    nan = float("nan")
    for name in ("weights", "logits", "changed", "largest", "kl"):
        assert dataclasses.replace(whole, **{name: nan}).faults()
    far = dataclasses.replace(whole, weights=17_234.0)
    assert far.faults() == ["a number of w is 17,234 steps of rounding away (limit 1)"]


def test_float32_has_limits_of_its_own():
    exact = Parity(
        rows="x", tokens=1, numbers="float32", architecture=(), weights=0.5, worst="w",
        update=None, kept=None, least_kept="", logits=0, changed=0, largest=2e-3,
        kl=2e-3, largest_kl=1, agreement=1, peak=5.0,
    )  # fmt: skip
    assert [x.split(":")[0] for x in exact.faults()] == [
        "the largest difference of logits",
        "the divergence, in nats a token",
    ]
    assert exact.facts()["limits"] == {
        "weights": 1, "logits": 1e-3, "kl": 1e-3, "largest": 1e-3,
    }  # fmt: skip
    chooses = dataclasses.replace(exact, experts=True)
    assert "largest" not in chooses.limits and len(chooses.faults()) == 1
    loud = dataclasses.replace(exact, peak=40.0, kl=0.0)
    assert not loud.faults()
    for other in ({"numbers": "bfloat16"}, {"architecture": ("excused",)}):
        assert not dataclasses.replace(exact, **other).faults()


# -- settings --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_again_what_a_model_computes(name):
    own = read_hf_config(SWITCHES / name)
    assert differences(own, from_hf_config(to_hf_config(own), "x")) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10001.0},
        {"norm_eps": 1.1e-5},
        {"window": 5, "window_layers": (1,)},
        {"attention_scale": 0.3},
        {"attention_softcap": 30.0},
        {"logit_softcap": 30.0},
        {"embedding_scale": 2.0},
        {"residual_scale": 2.0},
        {"logit_divisor": 2.0},
        {"norm_shift": 1.0},
        {"activation": "gelu"},
        {"unrotated_layers": (0,)},
        {"parallel_residual": True},
        {"max_position": 4096},
        {"experts": Experts(4, 2)},
        {"rope_fraction": 0.4},
    ],
)
def test_every_setting_counts(changes):
    other = dataclasses.replace(TINY, **changes)
    assert len(differences(TINY, other)) == 1 and not excused(TINY, other)
    assert differences(other, other) == differences(TINY, TINY) == {}


def test_settings_that_mean_the_same_are_no_difference():
    same = {"window": 5, "attention_scale": 10**-0.5, "family": "mistral"}
    assert differences(TINY, dataclasses.replace(TINY, **same)) == {}


def test_a_dropped_window_is_excused_where_the_context_ends_with_it():
    own = dataclasses.replace(TINY, window=9, window_layers=(0, 1))
    short = dataclasses.replace(TINY, max_position=9)
    assert {*excused(own, short)} == {"windows", "max_position"}
    assert not excused(own, dataclasses.replace(TINY, max_position=10))


def test_rows_are_cut_to_a_context():
    places = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 0, 0], [*range(700, 710)]], np.int32)
    segments = np.array([[1] * 6 + [2] * 2 + [0] * 2, [1] * 10], np.int32)
    rows = ProofRows(places, places, segments, "x")
    assert rows.within(710) is rows
    cut = rows.within(4)
    assert cut.positions.max() == 3
    assert cut.positions[0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 0]
    one, two, three = cut.segments[0, [0, 4, 6]]
    assert len({one, two, three}) == 3 and 0 not in (one, two, three)
    assert cut.segments[0].tolist() == [one] * 4 + [two] * 2 + [three] * 2 + [0] * 2
    for row in range(2):  # No document is longer than the context.
        _, counts = np.unique(cut.segments[row][segments[row] > 0], return_counts=True)
        assert counts.max() <= 4


# -- whole proofs ----------------------------------------------------------------------


def written(exported, folder, name="hf", options=None):
    folder.mkdir()
    format = find_format(name)
    format.write(exported, folder, options or ExportOptions())
    return format.read_back(folder, exported)


def test_a_setting_that_the_files_lost_shows_in_the_logits(tmp_path, monkeypatch):
    """Even beside the rounding of Q4_0, and if no field of the settings showed it."""
    exported, options = tiny_export(), ExportOptions(quant="q4_0")
    found = written(exported, tmp_path / "x", "gguf", options)
    monkeypatch.setattr(same_model, "differences", lambda ours, theirs: {})
    other = dataclasses.replace(found.architecture, rope_theta=300.0)
    with pytest.raises(ParityError, match="the logits at the median token") as error:
        prove(
            exported,
            dataclasses.replace(found, architecture=other),
            tiny_rows(),
            "q4_0",
        )
    assert error.value.exit_code == 1 and "steps of" not in str(error.value)
    assert "use --dtype=float32 without --quant" in str(error.value)


def test_another_tokenizer_in_the_files_is_refused(tmp_path):
    exported = tiny_export()
    found = written(exported, tmp_path / "x")
    other = exported.tokenizer.with_chat_template("{{ messages }}")
    with pytest.raises(ParityError, match="other chat template than the run"):
        prove(
            exported,
            dataclasses.replace(found, tokenizer=other),
            tiny_rows(),
            "float32",
        )


def test_a_file_without_windows_says_where_its_context_ends(tmp_path):
    """llama.cpp computes none for Mixtral."""
    exported = tiny_export(window=9, window_layers=(0, 1))
    found = written(exported, tmp_path / "x", "gguf")
    assert not any(found.architecture.windows)
    reasons = same_model.require_same_model(exported, found, "float32")
    assert {*reasons} == {"windows", "max_position"}
    assert "no windows: the context ends at 9 tokens" in reasons.values()


@pytest.mark.soak
def test_a_file_without_windows_is_compared_within_its_context(tmp_path):
    exported = tiny_export(window=9, window_layers=(0, 1))
    found = written(exported, tmp_path / "x", "gguf")
    parity = prove(exported, found, tiny_rows(), "float32")
    assert parity.tokens == 43 and parity.logits < 1e-4


def test_the_proof_is_the_same_over_a_mesh(tmp_path):
    mesh = meshes.make_mesh(mesh_sizes(2, 2, 2))
    exported = tiny_export(family="llama", experts=None, layers=1)
    specs, model = exported.model.specs, exported.model
    base = jax.device_put(exported.base_weights, meshes.shardings(specs, mesh))
    config = LoRAConfig(rank=2, targets=("attention", "mlp"))
    over = with_adapters(model, base, config)
    found = prove(over, written(over, tmp_path / "x"), tiny_rows(), "float32")
    assert found.weights <= 1 and found.largest < 1e-4


@pytest.mark.parametrize("name", [in_soak(name) for name in NAMES])
@pytest.mark.parametrize("numbers", ["float32", "float16", "bfloat16", "q8_0", "q4_0"])
def test_no_family_fails_falsely(golden, tmp_path, name, numbers):
    """With adapters; experts that are chosen otherwise after rounding do not matter."""
    tiny = golden(name)
    targets = ("attention", "mlp")
    exported = with_adapters(
        tiny.model, tiny.params, LoRAConfig(rank=2, targets=targets)
    )
    code = numbers if numbers.startswith("q") else ""
    for format in ("gguf",) if code else ("hf", "gguf", "peft", "gguf-adapter"):
        if numbers not in (*EXPORT_FORMATS[format].dtypes, code):
            continue
        options = ExportOptions(quant=code) if code else ExportOptions(numbers)
        try:
            found = written(exported, tmp_path / format, format, options)
        except UserError as error:  # llama.cpp does not load such a shape.
            assert format.startswith("gguf"), error
            continue
        parity = prove(exported, found, tiny_rows(), numbers)
        print(
            name, format, numbers, parity.logits / parity.logits_limit, parity.facts()
        )


def test_a_model_runs_layer_by_layer(model, params, batch):
    """With windows in some layers only, so that layers differ."""
    shape = dataclasses.replace(model.architecture, window=5, window_layers=(1,))
    own = Model(shape, Options(dtype=jnp.float32))
    rows = (batch.positions, batch.segments)
    x = own.embed(params, batch.tokens, batch.positions)
    for number in range(shape.layers):
        layer = {p: v[number][None] for p, v in params.items() if "layers." in p}
        x = own.layer(layer, number, x, *rows)
    whole = own.hidden(params, batch.tokens, *rows)
    np.testing.assert_allclose(own.final_norm(params, x), whole, atol=1e-5)


@pytest.mark.soak
def test_two_processes_export_a_model_that_neither_holds(tmp_path):
    script = Path(__file__).parents[1] / "support" / "export_pair.py"
    port, root = str(free_port()), str(script.parents[2])
    pair = [
        subprocess.Popen(
            [sys.executable, script, str(number), port, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        for number in (0, 1)
    ]
    said = [process.communicate(timeout=400)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    first, second = ([x for x in text.splitlines() if "ids" in x] for text in said)
    assert first == second and len(first) == len(EXPORT_FORMATS)
    assert {x.name for x in tmp_path.iterdir()} == {"base", *EXPORT_FORMATS}


@pytest.mark.parametrize("is_head", [False, True])
def test_a_row_of_dora_knows_what_it_is_a_sum_of(is_head):
    """Rows of the vocabulary are compared by themselves, in both ends of a model."""
    rng, kind = np.random.default_rng(0), find_kind("dora")
    axes = ("embed", "vocab") if is_head else ("vocab", "embed")
    spec = Spec(tuple({"embed": 6, "vocab": 9}[axis] for axis in axes), axes)
    base = {"w": jnp.float32(rng.normal(size=spec.shape))}
    factors = random_adapters({"w": kind.matrix_specs(spec, 2)})
    settings = kind.settings({"w": 2}, LoRAConfig(rank=2, targets=("w",)))
    leaf, ids = kind.attach(base, factors, settings)["w"], jnp.array([7, 2])
    rows = vocabulary_rows(leaf, ids, is_head)
    assert isinstance(rows, WeightDecomposed) and rows.shape == (2, 6)
    whole = materialize(leaf)
    close(materialize(rows), (whole.T if is_head else whole)[ids])
