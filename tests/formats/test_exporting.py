"""An export holds the model: our reader and the format itself read it back."""

import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from helpers import mesh_sizes, random_adapters, random_params
from safetensors.numpy import load_file

from research.config.data_knobs import DataConfig
from research.config.knob_groups import LoRAConfig, MeshConfig, ModelConfig
from research.config.run_config import Config
from research.core.errors import SaveError, UserError, files_of_step
from research.formats.base_model import open_base
from research.formats.export_names import EXPORTED
from research.formats.huggingface import huggingface_export
from research.formats.load_parameters import load_base
from research.models.families.family_registry import from_hf_config, to_hf_config
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tasks.task_registry import exported_tokenizer
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Turn
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


def test_an_adapter_is_added_in_float32_and_rounded_once(base, tmp_path):
    """The frozen weights of a run in bfloat16 have no room for a small update."""
    model, config = Model(base.architecture), LoRAConfig(rank=2)
    split = trainable.make("lora", ModelConfig(), config, model.specs)
    params = random_params(model.specs)
    frozen = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
    adapters = random_adapters(split.specs)
    weights = split.forward(adapters, frozen, None)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        huggingface_export.export(model, weights, base.tokenizer, out, dtype)
    _, found = read_back(tmp_path / "float32", base)
    wide = {path: x.astype(jnp.float32) for path, x in frozen.items()}
    for path, value in lora.merge(wide, adapters, config).items():
        np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)
    whole, rounded = (
        load_file(tmp_path / dtype / "model.safetensors")
        for dtype in ("float32", "bfloat16")
    )
    for name, tensor in whole.items():
        np.testing.assert_array_equal(rounded[name], tensor.astype(jnp.bfloat16), name)


def edit(file, **fields):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


ENDS = {"eos_token_id": [258, 256], "temperature": 0.6, "top_p": 0.9}
SETTINGS = {
    "pad_token": "<|endoftext|>",
    "unk_token": {"content": "<|im_start|>", "__type": "AddedToken"},
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 500,
}


def export_for(folder, out, **data):
    """Exports the untrained model of `folder` as a run with these settings would."""
    base = open_base(str(folder))
    config = Config(data=DataConfig(**data))
    tokenizer = exported_tokenizer(config, base, config.data.system)
    model = Model(base.architecture)
    params = random_params(model.specs)
    huggingface_export.export(model, params, tokenizer, out)
    return tokenizer


def test_transformers_reads_all_that_the_base_model_had(tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = tiny_model.make_tiny_model(tmp_path / "model")
    edit(folder / "generation_config.json", **ENDS)
    edit(folder / "tokenizer_config.json", **SETTINGS)
    export_for(folder, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    for found in (config, generation):
        assert found.eos_token_id == [258, 256] and found.pad_token_id == 256
    assert (generation.temperature, generation.top_p) == (0.6, 0.9)
    before, after = map(AutoTokenizer.from_pretrained, (folder, tmp_path / "out"))
    for name in (*SETTINGS, "eos_token", "bos_token", "chat_template"):
        assert str(getattr(after, name)) == str(getattr(before, name)), name


def test_an_export_ends_its_answers_where_the_run_did(tmp_path):
    """The end of a turn is in a template; the end token of the model can be another."""
    folder = tiny_model.make_tiny_model(tmp_path / "model")
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert export_for(folder, tmp_path / "chat", template="chat").end_ids == (256, 258)
    again = open_base(str(tmp_path / "chat")).tokenizer
    assert again.end_ids == (256, 258) and again.eos == 256
    export_for(folder, tmp_path / "dolly", template="dolly")
    again = open_base(str(tmp_path / "dolly")).tokenizer
    assert again.end_ids == (256,) and "### Response" in again.chat_template


def test_an_export_has_the_system_text_unless_it_would_forge_structure(
    tmp_path, caplog
):
    base = open_base(str(tiny_model.make_tiny_model(tmp_path / "model")))
    for template in ("chat", "dolly"):
        data = DataConfig(template=template)
        wanted = exported_tokenizer(Config(data=data), base, 'Be "brief".')
        asked = ChatFormat(wanted, "chat").encode_prompt([Turn("user", "Hi")])
        own = ChatFormat(base.tokenizer, template, 'Be "brief".')
        assert asked == own.encode_prompt([Turn("user", "Hi")])
    forged = exported_tokenizer(Config(), base, "a<|im_end|>b")
    assert forged.chat_template == base.tokenizer.chat_template
    assert "holds a control token" in caplog.text


def test_a_config_alone_can_name_the_ends(tmp_path):
    folder = tiny_model.make_tiny_model(tmp_path / "model")
    edit(folder / "config.json", eos_token_id=[258, 256])
    assert open_base(str(folder)).tokenizer.end_ids == (258, 256)
    edit(folder / "generation_config.json", eos_token_id=257)
    assert open_base(str(folder)).tokenizer.end_ids == (257, 258)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be an id, or a"),
        ({"eos_token_id": [256, True]}, "eos_token_id is .256, True.; it must be"),
        ({"eos_token_id": [256, -1]}, "eos_token_id is .256, -1.; it must be"),
        ({"eos_token_id": [256, 264]}, "names 264, and the model has ids up to 263"),
        ({"pad_token_id": [0]}, "pad_token_id is .0.; it must be a whole number"),
        ([], "cannot be used .it is .., not dict"),
    ],
    ids=str,
)
def test_a_malformed_generation_config_is_named(tmp_path, fields, said):
    folder = tiny_model.make_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"generation_config\.json.*{said}"):
        open_base(str(folder))


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
    with pytest.raises(UserError, match="file/out cannot be a folder"):
        huggingface_export.export(
            Model(base.architecture), params, base.tokenizer, tmp_path / "file" / "out"
        )
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def exported(base, tmp_path):
    """Parameters of which `tmp_path` already holds an export."""
    model = Model(base.architecture)
    params = random_params(model.specs)
    huggingface_export.export(model, params, base.tokenizer, tmp_path / "out")
    return params


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (1e5, "float16", r"100000, .* too large for float16; .*=bfloat16 or float32"),
        (3.4e38, "bfloat16", r"too large for bfloat16; .*--dtype=float32"),
        (np.nan, "float32", r"not finite; .*--step"),
        (-np.inf, "float16", r"not finite; .*--step"),
    ],
)
def test_a_number_that_is_not_finite_leaves_the_older_export(
    base, exported, tmp_path, value, dtype, said
):
    before = load_file(tmp_path / "out" / "model.safetensors")
    path, params = sorted(exported)[-1], dict(exported)
    params[path] = params[path].at[(0,) * params[path].ndim].set(value)
    model, out = Model(base.architecture), tmp_path / "out"
    with pytest.raises(UserError, match=rf"^\S+\.\S+ holds .*{said}"):
        huggingface_export.export(model, params, base.tokenizer, out, dtype)
    assert list(tmp_path.iterdir()) == [out]
    after = load_file(out / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_full_disk_ends_an_export_with_the_code_of_a_failed_write(
    base, exported, tmp_path
):
    model, out = Model(base.architecture), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SaveError, match="File too large"), files_of_step(3, "all"):
            huggingface_export.export(model, exported, base.tokenizer, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [out], "the older export stays"


def test_others_may_read_an_export_where_the_umask_lets_them(base, exported, tmp_path):
    before = os.umask(0o027)
    try:
        huggingface_export.export(
            Model(base.architecture), exported, base.tokenizer, tmp_path / "new"
        )
    finally:
        os.umask(before)
    modes = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "new").iterdir()}
    assert modes == {oct(0o640)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_survives_its_config_file(name):
    assert from_hf_config(to_hf_config(PRESETS[name])) == PRESETS[name]
