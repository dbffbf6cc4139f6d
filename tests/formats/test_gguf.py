"""llama.cpp's files of every family: their names, layouts and metadata.

A file is written by the library of llama.cpp's authors from our own tables and read
back, so tables are held against what that library knows: its names of tensors.
"""

import dataclasses
import json
import re
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf_files import gguf_tensors, write_gguf, write_model
from helpers import random_params

from research.core.errors import UserError
from research.formats.base_model import open_base
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.gguf.metadata_fields import write_metadata
from research.formats.gguf.rope_metadata import DIVISORS, rope_tables
from research.formats.load_parameters import check_tensors, load_params
from research.models.architecture import RopeScaling
from research.models.families.family_registry import (
    FAMILIES,
    family_of,
    from_hf_config,
    to_hf_config,
)
from research.models.families.stored_tensor import used
from research.models.transformer import Model

SWITCHES = Path(__file__).parents[1] / "golden" / "switches"
SMALL = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 96, "rms_norm_eps": 1e-3,
    "rope_theta": 5e4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
RAMP = {**YARN, "original_max_position_embeddings": 4000, "truncate": False}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 7}
LAYERS = {"num_hidden_layers": 7}
NEOX = {"head_dim": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}
SHORT = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 4.0]}
# Models that files of every family can describe, by a name for the test.
SAID = {
    "llama": {"rope_scaling": LLAMA3, "head_dim": 64},
    "llama_bias": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"rope_scaling": {**YARN, "beta_fast": 16.0}, "tie_word_embeddings": True},
    "qwen3": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 20.0, "num_hidden_layers": 3},
    "gemma3_text": {
        **GEMMA, **LAYERS, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e3,
    },
    "olmo2": {"hidden_size": 32},
    "olmo3": {
        **LAYERS, "hidden_size": 32, "sliding_window": 7, "rope_scaling": YARN,
        "rope_theta": 5e5,
    },
    "phi3": {"hidden_size": 32, "partial_rotary_factor": 0.75, "sliding_window": None},
    "phi3_longrope": {
        "hidden_size": 32, "partial_rotary_factor": 0.75, "sliding_window": None,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "longrope", **SHORT},
    },
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.9, "logits_scaling": 1.7,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "smollm3": {**LAYERS, "num_key_value_heads": 4},
    "gpt_neox": {"layer_norm_eps": 1e-3, "rotary_pct": 0.5, "hidden_size": 32},
    "gpt_neox_serial": {"use_parallel_residual": False, "rotary_pct": 1.0},
    "mixtral": {"num_local_experts": 3, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "moe_intermediate_size": 20,
    },
    "olmoe": {
        "num_experts": 4, "num_experts_per_tok": 3, "hidden_size": 32,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 7,
        "rope_scaling": {**YARN, "truncate": False}, "num_hidden_layers": 3,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "n_inner": 24},
}  # fmt: skip


def shape_of(name, **changes):
    """The architecture of an entry of SAID."""
    model_type = re.sub("_(bias|longrope|serial)$", "", name)
    return from_hf_config({**SMALL, "model_type": model_type, **SAID[name], **changes})


def computed(architecture):
    """All that changes what a model computes; Mistral's files are read as Llama's."""
    return dataclasses.replace(architecture, family="", rope_scaling=RopeScaling())


@pytest.mark.parametrize("name", SAID)
def test_every_family_is_read_as_it_was_written(tmp_path, name):
    model = Model(shape_of(name))
    params = random_params(model.specs)
    file = GGUFFile(write_model(tmp_path / "x.gguf", model, params))
    found = file.read_architecture()
    assert computed(found) == computed(model.architecture)
    np.testing.assert_equal(rope_tables(found), rope_tables(model.architecture))
    if found.rope_scaling.kind != "longrope":
        assert found.rope_scaling == model.architecture.rope_scaling
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    again = Model(found)
    assert again.specs.keys() == model.specs.keys()
    loaded = load_params(file, again, dict.fromkeys(again.specs, here), np.float32)
    shifted = {t for s in family_of(found).gguf_tensors if s.shift for t in s.paths}
    for path, value in params.items():
        # Adding one and taking it off again rounds.
        close = 2e-7 if path in shifted else 0
        np.testing.assert_allclose(loaded[path], value, rtol=0, atol=close)


@pytest.mark.parametrize("name", SAID)
def test_tensors_have_the_names_that_llama_cpp_gives_them(name):
    """Its converter names every tensor of a Hugging Face folder by this table."""
    shape = shape_of(name)
    family, specs = family_of(shape), Model(shape).specs
    (kind,) = [
        arch
        for arch, said in gguf.MODEL_ARCH_NAMES.items()
        if said == family.gguf_architecture
    ]
    table = gguf.get_tensor_name_map(kind, shape.layers)
    ours = {p: t for t in used(family.gguf_tensors, specs) for p in t.paths}
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    for stored in ours.values():
        assert stored.name.replace("{}", "{bid}").rpartition(".")[0] in known
    for theirs in used(family.hf_tensors, specs):
        # The converter stacks experts under a name without their number.
        stacked = re.sub(r"experts\.\{\}", "experts", theirs.name.replace("{}", "1", 1))
        name, _, end = stacked.rpartition(".")
        expected = table.get_name(name.removeprefix("transformer."))
        expected = expected or table.get_name(name)
        if kind == gguf.MODEL_ARCH.GPT_OSS and not expected:
            continue  # It cuts and renames these tensors by hand.
        assert expected, theirs.name
        for path in theirs.paths:
            assert ours[path].name.format(1) == f"{expected}.{end}"


def test_recorded_models_that_llama_cpp_cannot_say_are_refused_by_name():
    """Switches that no field of a file carries, and llama.cpp takes for granted."""
    for name, switch in {
        "gemma2": "attention_scale",
        "gemma3": "windows",
        "smollm3": "ropes",
    }.items():
        config = json.loads((SWITCHES / name / "config.json").read_text())
        with pytest.raises(UserError, match=f"cannot say that {switch} is") as error:
            write_metadata(from_hf_config(config))
        assert "Export the model as a Hugging Face folder" in str(error.value)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("phi3", {"head_dim": 16}, "4 heads that are not 32 / 4 wide"),
        ("olmo2", {"tie_word_embeddings": True}, "a head that is tied"),
        ("gemma2", {"tie_word_embeddings": False}, "a head that is not tied"),
        ("gpt_neox", {"attention_bias": False}, "attention that has no biases"),
        ("qwen3_moe", {"norm_topk_prob": False}, "cannot say that experts is"),
        ("qwen3", {"head_dim": 64, "rope_scaling": RAMP}, "that ropes is"),
    ],
)
def test_models_that_llama_cpp_loads_otherwise_are_refused(name, changes, said):
    with pytest.raises(UserError, match=said):
        write_metadata(shape_of(name, **changes))


def test_both_forms_of_gelu_may_be_written():
    """llama.cpp computes the approximation for both."""
    write_metadata(shape_of("gpt_neox", hidden_act="gelu_new"))


def test_a_window_that_llama_cpp_ignores_ends_the_context(caplog):
    metadata = write_metadata(shape_of("mistral", sliding_window=20))
    assert metadata["llama.context_length"] == 20
    assert "contexts of 20 tokens" in caplog.text


@pytest.mark.parametrize(
    "theta, settings",
    [
        (5e5, LLAMA3),
        (5e5, {**LLAMA3, "factor": 32.0}),
        (1e4, {**LLAMA3, "high_freq_factor": 6.5}),
        (1e4, {**LLAMA3, "original_max_position_embeddings": 3000}),
        (1e4, {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    ],
)
def test_the_settings_of_llama_3_are_recovered_from_their_table(theta, settings):
    a = shape_of("llama", rope_theta=theta, rope_scaling=settings)
    found = reread(a).rope_scaling
    assert found.kind == "llama3"
    assert found.factor == settings["factor"]
    # Only the ratios of these three show in the table.
    share = found.original_max_position / found.low_freq_factor
    original = settings["original_max_position_embeddings"]
    assert share == pytest.approx(original / settings["low_freq_factor"], rel=1e-3)


def test_a_table_that_no_settings_make_is_carried_as_it_is(tmp_path):
    a = shape_of("llama")
    model = Model(a)
    odd = np.linspace(1, 9, a.head_dim // 2, dtype=np.float32)
    tensors = gguf_tensors(model, random_params(model.specs)) | {DIVISORS: odd}
    write_gguf(tmp_path / "x.gguf", write_metadata(a), tensors)
    found = GGUFFile(tmp_path / "x.gguf").read_architecture()
    assert found.rope_scaling.kind == "longrope"
    np.testing.assert_array_equal(np.float32(found.rope_scaling.short), odd)
    assert found.rope_scaling.short == found.rope_scaling.long
    # transformers reads this, too.
    assert from_hf_config(to_hf_config(found)) == found


def reread(a, tables=None, **changes):
    """The architecture that the metadata of `a` describe with some changed."""
    from research.formats.gguf.metadata_fields import read_architecture

    metadata = write_metadata(a) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    shapes = {name: tensor.shape for name, tensor in gguf_tensors_of(a).items()}
    tables = rope_tables(a) if tables is None else tables
    return read_architecture(metadata, shapes, tables, "x.gguf")


def gguf_tensors_of(a):
    model = Model(a)
    zeros = {path: np.zeros(spec.shape) for path, spec in model.specs.items()}
    return gguf_tensors(model, zeros)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("llama", {"general.architecture": "gemma9"}, "architecture is 'gemma9'"),
        ("llama", {"llama.block_count": None}, "x.gguf lacks block_count"),
        ("llama", {"llama.block_count": 0}, "block_count is 0; it must be a whole"),
        ("llama", {"llama.block_count": "2"}, "block_count is '2'; it must be"),
        ("llama", {"llama.attention.head_count": [4, 4]}, r"head_count is \[4, 4\]"),
        ("llama", {"llama.attention.head_count_kv": 3}, "num_key_value_heads is 3"),
        ("llama", {"llama.attention.value_length": 32}, "value_length is 32"),
        ("qwen3", {"qwen3.rope.dimension_count": 6}, "partial_rotary_factor is 0.75"),
        ("llama", {"llama.expert_count": 8}, "lacks expert_used_count"),
        ("llama", {"llama.nextn_predict_layers": 1}, "layers is 1, which Llama 2 and"),
        ("llama", {"llama.attention.scale": 0.5}, "attention.scale is 0.5"),
        ("llama", {"llama.attention.causal": False}, "causal is False; it must be"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "beside the table rope_freqs"),
        ("qwen3", {"qwen3.rope.scaling.type": "ntk"}, "rope_type is 'ntk'"),
        ("qwen3", {"qwen3.rope.freq_base": -1.0}, "rope.freq_base is -1.0"),
        (
            "qwen3",
            {"qwen3.attention.layer_norm_rms_epsilon": None},
            "lacks attention.layer_norm_rms_epsilon",
        ),
        (
            "olmo3",
            {"olmo2.attention.sliding_window_pattern": [True, False]},
            "one for each of the 7 layers",
        ),
        ("gpt2", {"gpt2.attention.head_count_kv": 1}, "head_count_kv is 1"),
        ("olmoe", {"olmoe.expert_gating_func": 2}, "gating_func is 2; it must be 1"),
        ("olmoe", {"olmoe.expert_used_count": 9}, "num_experts_per_tok is 9"),
    ],
)
def test_metadata_that_cannot_be_true_are_refused_in_one_sentence(name, changes, said):
    with pytest.raises(UserError, match=said) as error:
        reread(shape_of(name), **changes)
    assert str(error.value).startswith("x.gguf")
    assert "\n" not in str(error.value)


def test_metadata_that_change_nothing_are_read_over():
    a = shape_of("llama")
    notes = {
        "llama.vocab_size": 7, "llama.expert_count": 0, "llama.pooling_type": 0,
        "llama.rope.scaling.finetuned": False, "llama.attention.causal": True,
        "general.name": "Odd", "clip.has_vision_encoder": True,
    }  # fmt: skip
    assert reread(a, **notes) == a


def test_fields_that_a_file_lacks_have_llama_cpps_values():
    """Not those of a family's config.json, such as 256 wide heads of Gemma 3."""
    a = shape_of("gemma3_text", head_dim=4, num_key_value_heads=4)
    a = dataclasses.replace(a, attention_scale=0.5)
    lacking = ("head_count_kv", "key_length", "value_length", "sliding_window")
    found = reread(a, **{f"gemma3.attention.{name}": None for name in lacking})
    assert (found.kv_heads, found.head_dim, found.window) == (4, 4, 0)
    found = reread(shape_of("gemma2"), **{"gemma2.attention.sliding_window": None})
    assert found.window == 4096
    found = reread(a, **{"gemma3.rope.freq_base_swa": None})
    assert found.window_rope.theta == 1e4


@pytest.mark.parametrize("pattern", [3, [True, True, False] * 2 + [True]])
def test_a_pattern_of_windows_in_the_file_counts(pattern):
    a = shape_of("olmo3")
    found = reread(a, **{"olmo2.attention.sliding_window_pattern": pattern})
    assert found.window_layers == (0, 1, 3, 4, 6)


@pytest.mark.parametrize(
    "tables, said",
    [
        ({"rope_factors_long.weight": np.ones(3)}, "needs both"),
        ({DIVISORS: np.ones(2)}, "must hold 3 numbers above 0"),
        ({DIVISORS: np.array([1, 0, 1.0])}, "must hold 3 numbers above 0"),
        ({DIVISORS: np.array([1, np.nan, 1.0])}, "must hold 3 numbers above 0"),
    ],
)
def test_tables_of_rotary_embeddings_that_cannot_be_true_are_refused(tables, said):
    with pytest.raises(UserError, match=f"x.gguf.*{said}"):
        reread(shape_of("phi3"), tables=tables)


def test_an_old_file_has_a_tensor_for_each_expert(tmp_path):
    model = Model(shape_of("mixtral"))
    params = random_params(model.specs)
    tensors = gguf_tensors(model, params)
    for name in [name for name in tensors if "_exps" in name]:
        for expert, matrix in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps", f".{expert}")] = matrix
    assert "blk.1.ffn_down.2.weight" in tensors
    metadata = write_metadata(model.architecture)
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", metadata, tensors))
    assert computed(file.read_architecture()) == computed(model.architecture)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = load_params(file, model, dict.fromkeys(model.specs, here), np.float32)
    for path, value in params.items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)


def test_tensors_that_do_not_fit_the_metadata_are_named(tmp_path):
    model = Model(shape_of("qwen2"))
    params = random_params(model.specs)
    tensors = gguf_tensors(model, params)
    tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_k.weight"][:8]
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.ffn_gate_inp.weight"] = np.ones((2, 16), np.float32)
    file = GGUFFile(
        write_gguf(tmp_path / "x.gguf", write_metadata(model.architecture), tensors)
    )
    with pytest.raises(UserError) as error:
        check_tensors(file, model)
    said = str(error.value)
    assert "blk.0.attn_k.weight is [8, 16], not [16, 16]" in said
    assert "blk.1.ffn_up.weight is missing" in said
    assert "blk.0.ffn_gate_inp.weight is not part of this model" in said


def test_every_family_can_be_read_from_llama_cpps_files():
    said = {re.sub("_(bias|longrope|serial)$", "", name) for name in SAID}
    known = [family for family in FAMILIES.values() if family.gguf_architecture]
    assert said == {family.model_type for family in known}


SPACE, WORDS = "\u2581", [*"abcdefghijklmnopqrstuvwxyz", "ab", "\u2581ab"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(9)), SPACE, *WORDS]
TOKENIZER = {
    "model": "llama", "pre": "default", "tokens": TOKENS,
    "token_type": [2, 3, 3, *[6] * 9, *[1] * (len(WORDS) + 1)],
    "scores": [float(-n) for n in range(len(TOKENS))],
}  # fmt: skip


def write_whole(tmp_path, vocab):
    model = Model(shape_of("gemma3_text", vocab_size=vocab))
    keys = {f"tokenizer.ggml.{key}": value for key, value in TOKENIZER.items()}
    licence = {"general.license": "gemma"}
    file = tmp_path / "x.gguf"
    return model, write_model(
        file, model, random_params(model.specs), **keys, **licence
    )


def test_one_file_is_a_whole_base_model(tmp_path):
    model, file = write_whole(tmp_path, vocab=48)
    base = open_base(str(file))
    assert computed(base.architecture) == computed(model.architecture)
    assert base.tokenizer.encode_texts(["ab"])[0][-1] == TOKENS.index("ab")
    assert (base.tokenizer.bos, base.tokenizer.eos, base.licence) == (1, 2, "gemma")
    check_tensors(base.tensors, model)


def test_more_tokens_than_embeddings_do_not_belong_together(tmp_path):
    _, file = write_whole(tmp_path, vocab=16)
    with pytest.raises(UserError, match="ids up to 40 and the model 16 of them"):
        open_base(str(file))


def test_lists_of_every_type_are_read_as_the_library_reads_them(tmp_path):
    lists = {
        "general.a": ["", "é\n", "x" * 300], "general.b": [1, 2**31 - 1, -5],
        "general.c": [0.5, -1.25], "general.d": [True, False], "general.e": "text",
    }  # fmt: skip
    metadata = {"general.architecture": "llama", **lists}
    file = write_gguf(tmp_path / "x.gguf", metadata, {"a": np.ones(3, np.float32)})
    theirs = gguf.GGUFReader(file).fields
    found = GGUFFile(file).metadata
    assert found == {key: field.contents() for key, field in theirs.items()}
    assert lists.items() <= found.items()


def small_file(tmp_path):
    model = Model(shape_of("qwen3"))
    return write_model(tmp_path / "x.gguf", model, random_params(model.specs))


def test_a_length_that_cannot_be_is_refused_at_once(tmp_path):
    """The library would read nothing, for as often as the file says."""
    metadata = write_metadata(shape_of("qwen3")) | {"general.tags": [1, 2, 3]}
    file = write_gguf(tmp_path / "x.gguf", metadata, {})
    whole = file.read_bytes()
    three, many = (n.to_bytes(8, "little") for n in (3, 2**62))
    at = whole.index(three, whole.index(b"general.tags"))
    file.write_bytes(whole[:at] + many + whole[at + 8 :])
    with pytest.raises(UserError, match=r"x\.gguf is damaged: it ends at byte"):
        GGUFFile(file)


def test_no_cut_and_no_changed_byte_of_the_description_ends_in_a_traceback(tmp_path):
    file = small_file(tmp_path)
    whole = file.read_bytes()
    draw = np.random.default_rng(0)
    description = whole.index(b"token_embd") + 200
    for n in range(60):
        changed = bytearray(whole)
        if n % 2:
            changed = changed[: draw.integers(4, len(whole) - 64)]
        else:
            changed[draw.integers(4, description)] = draw.integers(256)
        file.write_bytes(changed)
        try:
            opened = GGUFFile(file)
            check_tensors(opened, Model(opened.read_architecture()))
        except UserError as error:
            assert str(file) in str(error) or "do not fit" in str(error)
            assert "\n" not in str(error)
        else:
            assert n % 2 == 0, "a file that was cut was read"


def test_tensors_that_share_bytes_are_refused(tmp_path):
    file = small_file(tmp_path)
    whole = file.read_bytes()
    # The place of a tensor's bytes lies behind its name, shape and type.
    at = whole.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16 + 4
    file.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    with pytest.raises(UserError, match=r"x\.gguf is damaged: .* share bytes"):
        GGUFFile(file)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"split.count": 3}, "one of 3 parts of a model; join them with"),
        ({"general.type": "adapter"}, "holds no model: its general.type is 'adapter'"),
    ],
)
def test_a_file_that_is_no_whole_model_says_what_it_is(tmp_path, changes, said):
    model = Model(shape_of("qwen3"))
    file = write_model(
        tmp_path / "x.gguf", model, random_params(model.specs), **changes
    )
    with pytest.raises(UserError, match=said):
        GGUFFile(file)
