"""Qwen 2 and 2.5 (biases of queries, keys and values), and Qwen 3 (norms of both)."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.layer_fields import layer_types, read_window
from research.models.families.model_family import ModelFamily


def read_qwen2(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Qwen2Config`, which has no field for its biases.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    shape = llama.read_shape(_with_defaults(fields), biases=("qkv",))
    return dataclasses.replace(shape, **_window(fields, shape.layers))


def read_qwen3(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Qwen3Config`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("mlp_bias", False)
    fields = _with_defaults(fields).with_defaults(head_dim=128)
    shape = llama.read_shape(fields, qk_norm="head")
    return dataclasses.replace(shape, **_window(fields, shape.layers))


def _with_defaults(fields: ConfigFields) -> ConfigFields:
    return fields.with_defaults(max_position_embeddings=32768)


def _window(fields: ConfigFields, layers: int) -> dict[str, Any]:
    if not fields.flag("use_sliding_window", False):
        return {}
    fields = fields.with_defaults(sliding_window=4096)
    first = fields.integer("max_window_layers", 28, low=0)
    return read_window(fields, layers, lambda layer: layer >= first)


def _write_window(a: Architecture) -> dict[str, Any]:
    return {
        "use_sliding_window": a.window > 0,
        "sliding_window": a.window or None,
        "max_window_layers": a.layers,
        "layer_types": layer_types(a),
    }


def write_qwen2(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Qwen2ForCausalLM` reads."""
    return llama.write_shape(a, "qwen2", "Qwen2ForCausalLM") | _write_window(a)


def write_qwen3(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Qwen3ForCausalLM` reads."""
    config = llama.write_shape(a, "qwen3", "Qwen3ForCausalLM")
    return config | {"attention_bias": "out" in a.biases} | _write_window(a)


QWEN2 = ModelFamily(
    model_type="qwen2",
    members="Qwen 2 and 2.5",
    from_hf_config=read_qwen2,
    to_hf_config=write_qwen2,
    hf_tensors=llama.HF_TENSORS,
    ignored_tensors=llama.FAMILY.ignored_tensors,
    gguf_architecture="qwen2",
    gguf_tensors=llama.gguf_tensors(llama.NAMES),
    gguf_fields=llama.GGUF_FIELDS,
)
QWEN3_NAMES = {**llama.NAMES, **llama.QK_NORMS}
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    members="Qwen 3",
    from_hf_config=read_qwen3,
    to_hf_config=write_qwen3,
    hf_tensors=llama.hf_tensors(QWEN3_NAMES),
    gguf_architecture="qwen3",
    gguf_tensors=llama.gguf_tensors(QWEN3_NAMES),
)
