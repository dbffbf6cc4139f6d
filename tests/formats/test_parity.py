"""An export is compared with its run, and a wrong one leaves nothing."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from helpers import mesh_sizes, random_adapters, random_params
from safetensors.numpy import load_file, save_file
from slurm_cluster import free_ports

from research.config.choices import EXPORT_FORMATS
from research.config.knob_groups import LoRAConfig, ModelConfig
from research.core.errors import ParityError
from research.formats.base_model import open_base
from research.formats.export_format import ExportedModel, ExportOptions
from research.formats.huggingface.huggingface_export import FORMAT
from research.formats.proof.logit_parity import prove
from research.formats.proof.proof_tokens import ProofRows
from research.formats.proof.parity_limits import LIMITS
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.weights import trainable


def make_rows(vocab, length=24):
    tokens = np.random.default_rng(2).integers(0, vocab, (2, length)).astype(np.int32)
    places = np.tile(np.arange(length, dtype=np.int32) % 16, (2, 1))
    segments = np.tile(1 + np.arange(length, dtype=np.int32) // 16, (2, 1))
    segments[1, -5:] = 0  # padding
    return ProofRows(tokens, places, segments, "random rows")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with adapters, as if trained for a while."""
    folder = tmp_path_factory.mktemp("parity") / "model"
    base = open_base(str(tiny_model.make_tiny_model(folder)))
    model = Model(base.architecture)
    split = trainable.make("lora", ModelConfig(), LoRAConfig(rank=2), model.specs)
    weights = split.forward(
        random_adapters(split.specs), random_params(model.specs), None
    )
    return ExportedModel(model, weights, base.tokenizer)


def written(exported, folder, dtype="float32", change=None):
    """The files of an export, read back; `change` may alter their tensors before."""
    folder.mkdir()
    FORMAT.write(exported, folder, ExportOptions(dtype))
    if change:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return FORMAT.read_back(folder, exported)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_export_is_within_the_limits_of_its_numbers(exported, tmp_path, dtype):
    rows = make_rows(exported.model.architecture.vocab)
    found = prove(exported, written(exported, tmp_path / "x", dtype), rows, dtype)
    assert found.tokens == 43 and found.agreement > 0.9
    limits = LIMITS[dtype]
    assert found.weights <= limits.weights and found.logits < limits.logits / 2
    assert found.kl < limits.kl / 2 and 0 <= found.kl <= found.largest_kl
    # The measure is not blind: what is rounded differs.
    assert (found.weights > 1e-5) == (dtype != "float32")


NORM, QUERY = (
    "model.layers.1.input_layernorm.weight",
    "model.layers.{}.self_attn.q_proj.weight",
)


def swap_layers(tensors):
    first, second = QUERY.format(0), QUERY.format(1)
    tensors[first], tensors[second] = tensors[second], tensors[first]


def swap_heads(tensors):
    name = QUERY.format(1)
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])


def scale(tensors):
    tensors[NORM] = (tensors[NORM] * 1.02).astype(tensors[NORM].dtype)


def spoil(tensors):
    tensors[NORM][3] = np.nan


@pytest.mark.parametrize(
    "change, said",
    [
        (swap_layers, r"layers\.attention\.query\.kernel of layer [01]"),
        (swap_heads, r"layers\.attention\.query\.kernel of layer 1"),
        (scale, r"layers\.attention_norm\.scale of layer 1 0\.02"),
        (spoil, r"layers\.attention_norm\.scale of layer 1 nan.*the logits nan"),
    ],
)
def test_files_that_compute_something_else_are_refused(
    exported, tmp_path, change, said
):
    rows = make_rows(exported.model.architecture.vocab)
    found = written(exported, tmp_path / "x", "bfloat16", change)
    with pytest.raises(ParityError, match=f"something else.*{said}") as error:
        prove(exported, found, rows, "bfloat16")
    assert error.value.exit_code == 1


def test_another_shape_or_tokenizer_in_the_files_is_refused(exported, tmp_path):
    rows = make_rows(exported.model.architecture.vocab)
    found = written(exported, tmp_path / "x")
    wide = dataclasses.replace(found.architecture, mlp=8)
    with pytest.raises(ParityError, match=r"layers\.mlp\.down\.kernel as \(.*, 8, "):
        prove(exported, dataclasses.replace(found, architecture=wide), rows, "float32")
    other = exported.tokenizer.with_chat_template("{{ messages }}")
    with pytest.raises(ParityError, match="other chat template than the run"):
        prove(exported, dataclasses.replace(found, tokenizer=other), rows, "float32")


def test_a_setting_that_the_files_lost_shows_in_the_logits(exported, tmp_path):
    """All weights are right, and the config says something else."""
    rows = make_rows(exported.model.architecture.vocab)
    found = written(exported, tmp_path / "x")
    turned = dataclasses.replace(found.architecture, rope_theta=100.0)
    with pytest.raises(ParityError, match=r"the logits .*on random rows") as error:
        prove(
            exported, dataclasses.replace(found, architecture=turned), rows, "float32"
        )
    assert "the weights" not in str(error.value)


def test_the_proof_is_the_same_over_a_mesh(exported, tmp_path):
    mesh = meshes.make_mesh(mesh_sizes(2, 2, 2))
    model = exported.model
    split = trainable.make("lora", ModelConfig(), LoRAConfig(rank=2), model.specs)
    placed = {
        "params": jax.device_put(
            random_adapters(split.specs), meshes.shardings(split.specs, mesh)
        ),
        "frozen": jax.device_put(
            random_params(model.specs), meshes.shardings(model.specs, mesh)
        ),
    }
    weights = split.forward(placed["params"], placed["frozen"], None)
    over = dataclasses.replace(exported, weights=weights)
    rows = make_rows(model.architecture.vocab)
    found = prove(over, written(over, tmp_path / "x"), rows, "float32")
    assert found.weights < 1e-6 and found.largest < 1e-4


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
    port, root = str(free_ports(1)[0]), str(script.parents[2])
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
