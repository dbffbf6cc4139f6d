"""Gemma 2, and Gemma 3 as text: norms on both sides of a branch, windows, soft caps.

The multimodal Gemma 3 is read as its text part and written as a text model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.layer_fields import layer_types, read_window
from research.models.families.model_family import ModelFamily
from research.models.families.rope_fields import read_ropes, write_ropes


def _read(fields: ConfigFields, **switches: Any) -> Architecture:
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("use_bidirectional_attention", False)
    fields.only("mlp_bias", False)
    embed = fields.integer("hidden_size")
    return llama.read_shape(
        fields,
        activation="gelu_tanh",
        norm_at="both",
        norm_shift=1.0,
        embedding_scale=embed**0.5,
        attention_scale=fields.integer("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping"),
        logit_softcap=_cap(fields, "final_logit_softcapping"),
        **switches,
    )


def _cap(fields: ConfigFields, name: str) -> float:
    return 0.0 if fields.get(name) is None else fields.number(name)


COMMON = {
    "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
    "tie_word_embeddings": True, "sliding_window": 4096,
}  # fmt: skip


def read_gemma2(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Gemma2Config`: every other layer has a window.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields = fields.with_defaults(
        max_position_embeddings=8192,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        **COMMON,
    )
    shape = _read(fields)
    window = read_window(fields, shape.layers, lambda layer: layer % 2 == 0)
    return dataclasses.replace(shape, **window)


def read_gemma3(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Gemma3TextConfig`: five layers of six have a window.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields = fields.with_defaults(
        vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6, **COMMON
    )
    ropes = read_ropes(fields, llama.read_head_dim(fields), 1e4)
    shape = _read(fields, qk_norm="head", **llama.rope_switches(ropes[0]))
    every = fields.integer("sliding_window_pattern", 6)
    window = read_window(fields, shape.layers, lambda layer: (layer + 1) % every != 0)
    return llama.with_window(shape, window, ropes[1])


def read_multimodal(fields: ConfigFields) -> Architecture:
    """Reads the text part of `Gemma3Config`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    return read_gemma3(fields.group("text_config"))


def _write(a: Architecture, model_type: str, model_class: str) -> dict[str, Any]:
    assert a.attention_scale is not None
    return llama.write_shape(a, model_type, model_class) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(a.attention_scale**-2),
        "attn_logit_softcapping": a.attention_softcap or None,
        "final_logit_softcapping": a.logit_softcap or None,
        "attention_bias": "out" in a.biases,
        "sliding_window": a.window or None,
        "layer_types": layer_types(a),
    }


def write_gemma2(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Gemma2ForCausalLM` reads."""
    return _write(a, "gemma2", "Gemma2ForCausalLM")


def write_gemma3(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Gemma3ForCausalLM` reads."""
    config = _write(a, "gemma3_text", "Gemma3ForCausalLM") | write_ropes(a)
    local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    return config | {"rope_local_base_freq": local}


NAMES = {
    **llama.NAMES,
    **llama.OUT_NORMS,
    "layers.mlp_norm.scale": ("pre_feedforward_layernorm", "ffn_norm"),
}

GGUF_FIELDS = {
    **llama.GGUF_FIELDS,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _unsaid(
    largest: int, window: int | None
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The fields that llama.cpp knows without a word in the file.

    The scores are scaled by the width of a head; in the model of 27 billion parameters,
    which has `largest` layers, by the share of a head in the embedding. `window`: its
    width where the file gives none.
    """

    def unsaid(config: dict[str, Any]) -> dict[str, Any]:
        share = config["hidden_size"] // config["num_attention_heads"]
        is_largest = config["num_hidden_layers"] == largest
        width = share if is_largest else config["head_dim"]
        said = config.get("sliding_window", window)
        return {"query_pre_attn_scalar": width, "sliding_window": said}

    return unsaid


GEMMA2 = ModelFamily(
    model_type="gemma2",
    members="Gemma 2",
    from_hf_config=read_gemma2,
    to_hf_config=write_gemma2,
    hf_tensors=llama.hf_tensors(NAMES),
    gguf_architecture="gemma2",
    gguf_tensors=llama.gguf_tensors(NAMES, norm_shift=1.0),
    gguf_fields=GGUF_FIELDS,
    gguf_period=2,
    gguf_unsaid=_unsaid(46, window=4096),
)
GEMMA3_NAMES = {**NAMES, **llama.QK_NORMS}
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    members="Gemma 3",
    from_hf_config=read_gemma3,
    to_hf_config=write_gemma3,
    hf_tensors=llama.hf_tensors(GEMMA3_NAMES),
    # The second and the third are those of multimodal files, old and new.
    beginnings=("model.", "language_model.model.", "model.language_model."),
    ignored_tensors=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    gguf_architecture="gemma3",
    gguf_tensors=llama.gguf_tensors(GEMMA3_NAMES, norm_shift=1.0),
    gguf_fields={**GGUF_FIELDS, "rope.freq_base_swa": "rope_local_base_freq"},
    gguf_period=6,
    gguf_unsaid=_unsaid(62, window=None),
)
MULTIMODAL = dataclasses.replace(GEMMA3, from_hf_config=read_multimodal)
