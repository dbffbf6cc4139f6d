"""A family is one registry entry: this file adds one, and nothing else is changed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from research.config.run_config import MeshConfig
from research.core.errors import UserError
from research.formats.base_model import open_base
from research.formats.huggingface.huggingface_export import export
from research.formats.load_parameters import load_base
from research.models.architecture import Architecture
from research.models.families import family_registry
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor
from research.models.presets import PRESETS
from research.models.transformer import Model
from research.parallel.mesh import make_mesh
from research.weights.parameter_spec import Spec

ATTENTION = "layers.attention.{}.kernel"


def read_toy(fields):
    return Architecture(
        vocab=fields.integer("n_words"),
        embed=fields.integer("width"),
        mlp=fields.integer("inner_width"),
        layers=fields.integer("depth"),
        heads=fields.integer("readers"),
        kv_heads=fields.integer("sources"),
        head_dim=fields.integer("width") // fields.integer("readers"),
        tied_head=not fields.flag("own_head"),
        max_position=fields.integer("reach"),
    )


def write_toy(a):
    return {
        "model_type": "toy",
        "n_words": a.vocab,
        "width": a.embed,
        "inner_width": a.mlp,
        "depth": a.layers,
        "readers": a.heads,
        "sources": a.kv_heads,
        "own_head": not a.tied_head,
        "reach": a.max_position,
    }


def toy_tensor(name, *paths, **rules):
    return StoredTensor(name, paths, **rules)


TOY = ModelFamily(
    model_type="toy",
    members="none",
    from_hf_config=read_toy,
    to_hf_config=write_toy,
    hf_tensors=(
        toy_tensor("words", "embedding.table"),
        toy_tensor("out.norm", "final_norm.scale"),
        toy_tensor("out.words", "head.kernel", transposed=True),
        toy_tensor("block{}.norm1", "layers.attention_norm.scale"),
        # Two matrices in one, and not transposed.
        toy_tensor("block{}.q", ATTENTION.format("query")),
        toy_tensor(
            "block{}.kv", ATTENTION.format("key"), ATTENTION.format("value"),
            transposed=True,
        ),
        toy_tensor("block{}.o", ATTENTION.format("output"), transposed=True),
        toy_tensor("block{}.norm2", "layers.mlp_norm.scale"),
        toy_tensor(
            "block{}.gate_up", "layers.mlp.gate.kernel", "layers.mlp.up.kernel",
            interleaved=True,
        ),
        toy_tensor("block{}.down", "layers.mlp.down.kernel", transposed=True),
    ),
)  # fmt: skip


def toy_tensors(llama):
    """The tensors of a Llama as a toy's, laid out by hand."""
    toy = {
        "words": llama["model.embed_tokens.weight"],
        "out.norm": llama["model.norm.weight"],
        "out.words": llama["lm_head.weight"],
    }
    for i in range(tiny_model.CONFIG["num_hidden_layers"]):
        of = {
            name.split(".")[-2]: value
            for name, value in llama.items()
            if name.startswith(f"model.layers.{i}.")
        }
        gate_up = np.stack([of["gate_proj"], of["up_proj"]], 1)  # gate 0, up 0, ...
        layer = {
            "norm1": of["input_layernorm"],
            "q": of["q_proj"].T,
            "kv": np.concatenate([of["k_proj"], of["v_proj"]]),
            "o": of["o_proj"],
            "norm2": of["post_attention_layernorm"],
            "gate_up": gate_up.reshape(-1, of["gate_proj"].shape[1]).T,
            "down": of["down_proj"],
        }
        toy |= {f"block{i}.{name}": value for name, value in layer.items()}
    return {name: np.ascontiguousarray(value) for name, value in toy.items()}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return tiny_model.make_tiny_model(tmp_path_factory.mktemp("family") / "llama")


@pytest.fixture
def toy_folder(llama_folder, tmp_path, monkeypatch):
    """The same model as a folder of the new family, which is registered."""
    monkeypatch.setitem(family_registry.FAMILIES, "toy", TOY)
    folder = tmp_path / "toy"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama_folder / name).read_bytes())
    tensors = toy_tensors(load_file(llama_folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    shape = open_base(str(llama_folder)).architecture
    (folder / "config.json").write_text(json.dumps(write_toy(shape)))
    return folder


def load(folder):
    base = open_base(str(folder))
    model = Model(base.architecture)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return base, model, load_base(base, model, mesh, jnp.float32, seed=0)


def logits_of(model, params):
    tokens = np.arange(24)[None] * 7 % model.architecture.vocab

    @jax.jit
    def logits(params):
        places = jnp.arange(24)[None]
        hidden = model.hidden(params, tokens, places, jnp.ones_like(tokens))
        return model.logits(params, hidden)

    return logits(params)


def test_a_new_family_loads_computes_and_is_exported(
    llama_folder, toy_folder, tmp_path
):
    _, llama, expected = load(llama_folder)
    base, toy, params = load(toy_folder)
    assert toy.architecture == dataclasses.replace(llama.architecture, family="toy")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(logits_of(toy, params), logits_of(llama, expected))

    export(toy, params, base.tokenizer, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(toy_folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    # A class of transformers would have an id of its own in its place.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] is None
    again, _, found = load(tmp_path / "out")
    assert again.architecture == base.architecture
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_family_must_name_every_parameter(toy_folder, monkeypatch):
    """Otherwise an export would drop a matrix without a word."""
    lacking = dataclasses.replace(TOY, hf_tensors=TOY.hf_tensors[:-1])
    monkeypatch.setitem(family_registry.FAMILIES, "toy", lacking)
    with pytest.raises(ValueError, match=r"layers\.mlp\.down\.kernel"):
        load(toy_folder)


def test_an_unknown_family_is_answered_with_what_there_is(toy_folder):
    config = json.loads((toy_folder / "config.json").read_text())
    (toy_folder / "config.json").write_text(json.dumps(config | {"model_type": "tpy"}))
    with pytest.raises(UserError) as error:
        open_base(str(toy_folder))
    said = str(error.value)
    assert f"{toy_folder / 'config.json'}: model_type is 'tpy'" in said
    assert "did you mean 'toy'?" in said
    for family in family_registry.FAMILIES.values():
        assert f"{family.model_type} ({family.members})" in said
    assert "research/models/families" in said


@pytest.mark.parametrize("kind", [None, 3, ["llama"], {}])
def test_a_model_type_of_any_kind_is_the_users_error(kind):
    with pytest.raises(UserError, match="model_type is"):
        family_registry.from_hf_config({"model_type": kind})
    with pytest.raises(UserError, match=r"general\.architecture is"):
        family_registry.find_gguf_family({"general.architecture": kind}, "x.gguf")


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "in rope_scaling lacks factor"),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": None}},
            "in rope_scaling lacks low_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "in rope_parameters: rope_type is 'dynamic', whose frequencies change with "
            "the length of a row; it must be one of default, linear, llama3, yarn",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 0.5}},
            "in rope_scaling: factor is 0.5; it must be at least 1",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2, "short_factor": [1.0]}},
            "short_factor is [1.0]; it must be a list of 8 numbers above 0",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["x"]},
            "layer_types is ['x']; it must be 2 times full_attention or sliding_atten",
        ),
        (
            {"model_type": "qwen3_next"},
            "model_type is 'qwen3_next', which is not computed here: three of four ",
        ),
        (
            {"rope_parameters": {"full_attention": LLAMA3}},
            "in rope_parameters: full_attention is",
        ),
        ({"rope_theta": "1e5"}, "rope_theta is '1e5'; it must be a number above 1"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5; it must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole"),
        ({"rms_norm_eps": None, "hidden_size": None}, "lacks hidden_size"),
        ({"tie_word_embeddings": "no"}, "'no'; it must be true or false"),
        ({"partial_rotary_factor": 0.5}, "0.5; it must be 1.0, the only value"),
        ({"hidden_size": 10**12}, "it must be a whole number from 1 to 2147483647"),
        ({"num_hidden_layers": 10**8}, "it must be a whole number from 1 to 10000"),
        ({"head_dim": 15}, "head_dim is 15; it must be a multiple of 2"),
        ({"hidden_size": 2, "num_attention_heads": 4}, "head_dim is 0; it must be"),
        ({"num_key_value_heads": 3}, "is 3; it must be a divisor of the 4 heads"),
        ({"rms_norm_eps": 1e5}, "it must be a number above 0 up to 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; it"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor is 1.0; it must be a number above 1",
        ),
        (
            {"quantization_config": {"quant_method": "aqlm"}},
            "says that the weights are quantised (aqlm), and codes of bitsandbytes, "
            "awq, gptq are read; give the model as it was before",
        ),
    ],
    ids=str,
)
def test_a_malformed_field_is_named_with_what_is_right(changes, said):
    config = tiny_model.CONFIG | changes
    with pytest.raises(UserError) as error:
        family_registry.from_hf_config(config, "here/config.json")
    assert str(error.value).startswith("here/config.json")
    assert said in str(error.value)


def test_a_setting_that_changes_nothing_is_no_reason_to_refuse():
    plain = family_registry.from_hf_config(tiny_model.CONFIG)
    config = tiny_model.CONFIG | {"pretraining_tp": 2, "quantization_config": None}
    assert family_registry.from_hf_config(config) == plain


def test_a_sliding_window_is_that_of_every_layer_of_a_mistral():
    config = tiny_model.CONFIG | {"model_type": "mistral", "sliding_window": 100}
    shape = family_registry.from_hf_config(config)
    assert (shape.family, shape.max_position) == ("mistral", 512)
    assert shape.windows == (100,) * shape.layers
    written = family_registry.to_hf_config(shape)
    assert written["architectures"] == ["MistralForCausalLM"]
    assert family_registry.from_hf_config(written) == shape


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_either_spelling_of_the_rotary_scaling_is_enough(spelling):
    """Readers before transformers 5 know `rope_scaling` alone."""
    shape = PRESETS["llama3.1-8b"]
    written = family_registry.to_hf_config(shape)
    other = {"rope_scaling", "rope_parameters"} - {spelling}
    for name in other:
        del written[name]
    assert family_registry.from_hf_config(written) == shape


def test_transformers_reads_the_scaling_that_is_written():
    from transformers import LlamaConfig

    for name in ("llama3.1-8b", "smollm2-135m"):
        written = family_registry.to_hf_config(PRESETS[name])
        read = LlamaConfig(**written).rope_parameters
        assert read == written["rope_parameters"], name


def test_the_fingerprint_of_a_saved_runs_shape_does_not_change():
    """Runs from random weights are resumed by it: a new field must keep this line."""
    assert PRESETS["tiny"].describe() == (
        "Architecture(vocab=256, embed=64, mlp=128, layers=2, heads=4, kv_heads=4, "
        "head_dim=16, tied_head=True, rope_theta=10000.0, rope_scaling=RopeScaling("
        "kind='default', factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, "
        "original_max_position=8192), norm_eps=1e-05, max_position=2048)"
    )
    other = dataclasses.replace(PRESETS["tiny"], family="toy")
    assert other.describe().endswith("max_position=2048, family='toy')")


SPECS = {
    "q": Spec((2, 6, 3, 4), ("layers", "embed", "heads", "head_dim"), stacked=1),
    "k": Spec((2, 6, 3, 4), ("layers", "embed", "heads", "head_dim"), stacked=1),
    "experts": Spec(
        (2, 5, 6, 7), ("layers", "expert", "embed", "mlp"), n_in=1, stacked=2
    ),
    "bias": Spec((2, 3, 4), ("layers", "heads", "head_dim"), n_in=0, stacked=1),
}
RULES = {
    "fused": StoredTensor("{}.qk", ("q", "k"), transposed=True),
    "by head": StoredTensor("{}.qk", ("q", "k"), transposed=True, interleaved=True),
    "not transposed": StoredTensor("{}.qk", ("q", "k"), interleaved=True),
    "rotary": StoredTensor("{}.q", ("q",), transposed=True, rotary_neighbours=True),
    "rotary bias": StoredTensor("{}.b", ("bias",), rotary_neighbours=True),
    "an expert each": StoredTensor("{}.e{}.up", ("experts",), transposed=True),
    "all experts": StoredTensor("{}.up", ("experts",), transposed=True),
}
SHAPES = {
    "fused": (24, 6), "by head": (24, 6), "not transposed": (6, 24),
    "rotary": (12, 6), "rotary bias": (12,), "an expert each": (7, 6),
    "all experts": (5, 7, 6),
}  # fmt: skip


def random_of(stored):
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=SPECS[path].shape) for path in stored.paths}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_undone(rule):
    stored = RULES[rule]
    values = random_of(stored)
    named = list(stored.names(SPECS))
    assert len({name for name, _ in named}) == (10 if rule == "an expert each" else 2)
    for name, index in named:
        assert name.startswith(f"{index[0]}.")
        one = [values[path][index] for path in stored.paths]
        packed = stored.pack(one, SPECS)
        assert packed.shape == stored.shape(SPECS) == SHAPES[rule]
        for path, value in zip(stored.paths, one, strict=True):
            np.testing.assert_array_equal(stored.unpack(path, packed, SPECS), value)


def test_rules_lay_out_rows_as_other_tools_do():
    values = random_of(RULES["fused"])
    q, k = (values[path][0].reshape(6, 12).T for path in ("q", "k"))
    heads = [x[4 * n : 4 * n + 4] for n in range(3) for x in (q, k)]
    # llama.cpp's own conversion: halves of a head become neighbours.
    neighbours = q.reshape(3, 2, 2, 6).swapaxes(1, 2).reshape(12, 6)
    one = [values["q"][0], values["k"][0]]
    for rule, expected in (
        ("fused", np.concatenate([q, k])),
        ("by head", np.concatenate(heads)),
        ("not transposed", np.concatenate(heads).T),
    ):
        np.testing.assert_array_equal(RULES[rule].pack(one, SPECS), expected)
    np.testing.assert_array_equal(RULES["rotary"].pack(one[:1], SPECS), neighbours)
