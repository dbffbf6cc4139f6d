"""An export holds the model: our reader and the format itself read it back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from helpers import mesh_sizes, random_adapters, random_params

from research.config.knob_groups import LoRAConfig, MeshConfig, ModelConfig
from research.core.errors import UserError
from research.formats import huggingface_export
from research.formats.base_model import EXPORTED, open_base
from research.formats.load_parameters import load_base
from research.models.families.family_registry import from_hf_config, to_hf_config
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.weights import trainable
from research.weights.adapters import lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return open_base(str(tiny_model.make_tiny_model(folder)))


def read_back(folder, base):
    """The parameters of an exported folder, through the ordinary reader."""
    again = open_base(str(folder))
    assert again.architecture == base.architecture
    one_device = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = Model(again.architecture)
    return again, load_base(again, model, one_device, jnp.float32, 0)


def test_every_parameter_comes_back_bit_for_bit(base, tmp_path):
    params = random_params(Model(base.architecture).specs)
    huggingface_export.export(
        Model(base.architecture), params, base.tokenizer, tmp_path / "out"
    )
    again, found = read_back(tmp_path / "out", base)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert again.tokenizer.eos_token == base.tokenizer.eos_token
    texts = ["Hello, <|im_end|> 123", "ü\n\n  x"]
    assert again.tokenizer.encode_texts(texts) == base.tokenizer.encode_texts(texts)
    assert again.tokenizer.chat_template == base.tokenizer.chat_template


def test_adapters_are_added_in(base, tmp_path):
    model = Model(base.architecture)
    split = trainable.make("lora", ModelConfig(), LoRAConfig(rank=2), model.specs)
    frozen = random_params(model.specs)
    adapters = random_adapters(split.specs)
    weights = split.forward(adapters, frozen, None)
    huggingface_export.export(model, weights, base.tokenizer, tmp_path / "out")
    _, found = read_back(tmp_path / "out", base)
    merged = lora.merge(frozen, adapters, LoRAConfig(rank=2))
    for path, value in merged.items():
        np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)
    assert any((found[p] != frozen[p]).any() for p in adapters)


def test_shards_of_a_mesh_make_the_same_files(base, tmp_path):
    mesh = meshes.make_mesh(mesh_sizes(2, 2, 2))
    model = Model(base.architecture)
    params = random_params(model.specs)
    placed = jax.device_put(params, meshes.shardings(model.specs, mesh))
    for name, values in (("one", params), ("eight", placed)):
        huggingface_export.export(model, values, base.tokenizer, tmp_path / name)
    one, eight = (tmp_path / name / "model.safetensors" for name in ("one", "eight"))
    assert one.read_bytes() == eight.read_bytes()


def test_large_models_are_split_into_files_with_an_index(base, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_export, "FILE_BYTES", 100_000)
    params = random_params(Model(base.architecture).specs)
    out = tmp_path / "out"
    huggingface_export.export(Model(base.architecture), params, base.tokenizer, out)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert max(f.stat().st_size for f in files) < 110_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in params.values())
    jax.tree.map(np.testing.assert_array_equal, read_back(out, base)[1], params)


def test_bfloat16_files_hold_rounded_values(base, tmp_path):
    params = random_params(Model(base.architecture).specs)
    model = Model(base.architecture)
    huggingface_export.export(
        model, params, base.tokenizer, tmp_path / "out", "bfloat16"
    )
    _, found = read_back(tmp_path / "out", base)
    for path, value in params.items():
        rounded = value.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(found[path], rounded, err_msg=path)


def test_a_run_stands_for_the_model_it_has_exported(base, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"research\.export"):
        open_base(str(run))
    params = random_params(Model(base.architecture).specs)
    model = Model(base.architecture)
    huggingface_export.export(model, params, base.tokenizer, run / EXPORTED)
    assert open_base(str(run)).architecture == base.architecture


def test_a_full_disk_or_a_wrong_place_leaves_nothing(base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    params = random_params(Model(base.architecture).specs)
    with pytest.raises(UserError, match="cannot be written"):
        huggingface_export.export(
            Model(base.architecture), params, base.tokenizer, tmp_path / "file" / "out"
        )
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_survives_its_config_file(name):
    assert from_hf_config(to_hf_config(PRESETS[name])) == PRESETS[name]
