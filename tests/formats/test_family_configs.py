"""Each family's config.json: older spellings, implied values, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from research.core.errors import UserError
from research.formats.huggingface.huggingface_weights import HuggingFaceWeights
from research.formats.load_parameters import check_tensors
from research.models.architecture import Rope, RopeScaling
from research.models.families.family_registry import FAMILIES, from_hf_config
from research.models.transformer import Model

SWITCHES = Path(__file__).parents[1] / "golden" / "switches"


def recorded(name):
    return json.loads((SWITCHES / name / "config.json").read_text())


def respelt(name, *absent, **changes):
    """The recorded config with some fields in another spelling."""
    config = {k: v for k, v in recorded(name).items() if k not in absent}
    return from_hf_config(config | changes)


def test_every_family_has_a_recorded_model():
    models = [recorded(path.name)["model_type"] for path in SWITCHES.iterdir()]
    assert {*FAMILIES} - {"llama", "mistral", "gemma3"} == {*models}


OLD = {
    "qwen2": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "gemma3": {
        "rope_theta": 1e6, "rope_local_base_freq": 100.0, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "olmo3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "phi3_longrope": {
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "su", "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [1.0, 3.0, 4.0],
        },
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "smollm3": {"rope_theta": 2e6, "no_rope_layer_interval": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_the_old_spelling_means_the_same(name):
    new = ("rope_parameters", "layer_types", "no_rope_layers")
    assert respelt(name, *new, **OLD[name]) == from_hf_config(recorded(name))


def test_fields_that_are_absent_have_the_defaults_of_their_class():
    absent = ("attn_logit_softcapping", "final_logit_softcapping", "layer_types")
    gemma = respelt("gemma2", *absent, sliding_window=None)
    assert (gemma.attention_softcap, gemma.logit_softcap) == (50.0, 30.0)
    assert not any(gemma.windows)
    uncapped = respelt("gemma2", attn_logit_softcapping=None)
    assert uncapped.attention_softcap == 0.0
    windowed = respelt("gemma2", "sliding_window", "layer_types")
    assert windowed.windows == (4096, 0, 4096)
    assert respelt("gemma3", "rope_parameters").window_rope == Rope(1e4)
    assert respelt("olmo3", "rope_parameters").rope_theta == 5e5
    assert respelt("gpt2", "n_inner").mlp == 4 * 16
    assert respelt("qwen3", "head_dim").head_dim == 128
    # A window of Qwen counts only with its flag.
    assert not any(respelt("qwen2_window", use_sliding_window=False).windows)


def test_yarn_and_longrope_scale_cosines_as_their_papers_say():
    yarn = from_hf_config(recorded("qwen2")).rope_scaling
    assert yarn.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    both = recorded("qwen2")["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 0.5}
    ratio = respelt("qwen2", rope_parameters=both).rope_scaling.attention_factor
    assert ratio == pytest.approx((0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1))
    long = from_hf_config(recorded("phi3_longrope")).rope_scaling
    factor = 512 / 160
    expected = np.sqrt(1 + np.log(factor) / np.log(160))
    assert (long.factor, long.attention_factor) == pytest.approx((factor, expected))


def test_a_scaling_shows_only_what_differs_from_the_first_fields():
    assert "beta_fast" not in repr(RopeScaling())
    assert "beta_fast=16" in repr(RopeScaling(kind="yarn", beta_fast=16))


def test_the_multimodal_gemma_is_read_as_its_text_part():
    text = {k: v for k, v in recorded("gemma3").items() if k != "vocab_size"}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    shape = from_hf_config(whole)
    assert (shape.family, shape.vocab) == ("gemma3_text", 262208)
    text["vocab_size"] = recorded("gemma3")["vocab_size"]
    assert from_hf_config(whole) == from_hf_config(recorded("gemma3"))


@pytest.mark.parametrize(
    "name, beginning, other, ignored",
    [
        ("gemma3", "model.", "language_model.model.", "vision_tower.x.weight"),
        ("gemma3", "model.", "model.language_model.", "model.multi_modal_projector.y"),
        ("gpt2", "transformer.", "", "h.0.attn.bias"),
        ("gpt_neox", "", "", "gpt_neox.layers.0.attention.masked_bias"),
    ],
)
def test_a_file_may_spell_names_otherwise(tmp_path, name, beginning, other, ignored):
    shapes = json.loads((SWITCHES / name / "tensors.json").read_text())["shapes"]
    tensors = {
        other + tensor.removeprefix(beginning): np.zeros(shape, np.float32)
        for tensor, shape in shapes.items()
    }
    tensors[ignored] = np.zeros(3, np.float32)
    model = Model(from_hf_config(recorded(name)))
    save_file(tensors, tmp_path / "model.safetensors")
    check_tensors(HuggingFaceWeights(tmp_path), model)
    tensors["h.9.attn.c_attn.bias"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"h\.9\.attn\.c_attn\.bias is not part"):
        check_tensors(HuggingFaceWeights(tmp_path), model)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_att"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; it"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_l"),
        ("gpt2", {"activation_function": "relu"}, "is 'relu'; it must be one of gelu,"),
        ("gpt_neox", {"num_attention_heads": 3}, "num_attention_heads is 3; it must"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "(rotary embedding) or 0 (none)"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]; it must"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "layer_types is ['chunk"),
        ("phi3", {"attention_bias": True}, "attention_bias is True; it must be False"),
        (
            "phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}},
            "partial_rotary_factor is 0.4; it must be an even share of the 8 numbers",
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic', whose"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "is [1]; it must be []: all layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "is 2; it must be 1: all layers"),
        ("qwen3", {"model_type": "gemma4"}, "layers share keys and values, and each"),
        ("qwen3", {"model_type": "lfm2"}, "most of its layers are short convol"),
        ("qwen3", {"model_type": "mamba2"}, "keep a state in place of keys and"),
        ("qwen3", {"model_type": "llama4"}, "it attends in chunks, and its experts"),
    ],
    ids=str,
)  # fmt: skip
def test_another_computation_is_refused_with_its_name(name, changes, said):
    with pytest.raises(UserError) as error:
        respelt(name, **changes)
    assert said in str(error.value)
