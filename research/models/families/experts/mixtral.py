"""Mixtral: Mistral with a choice of two out of eight MLPs."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.experts.expert_fields import (
    read_experts,
    with_experts,
    write_experts,
)
from research.models.families.layer_fields import read_window


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `MixtralConfig`, whose window is that of every layer.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields = fields.with_defaults(
        rope_theta=1e6, rms_norm_eps=1e-5, max_position_embeddings=131072,
        num_key_value_heads=8,
    )  # fmt: skip
    shape = llama.read_shape(fields, experts=read_experts(fields, 8, 2, 0.001, True))
    window = read_window(fields, shape.layers, lambda layer: True)
    return dataclasses.replace(shape, **window)


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `MixtralForCausalLM` reads."""
    return llama.write_shape(a, "mixtral", "MixtralForCausalLM") | {
        "sliding_window": a.window or None,
        **write_experts(a),
    }


EXPERT = "block_sparse_moe.experts.{}."
FAMILY = with_experts(
    llama.FAMILY,
    "block_sparse_moe.gate",
    {"gate": f"{EXPERT}w1", "up": f"{EXPERT}w3", "down": f"{EXPERT}w2"},
    model_type="mixtral",
    members="Mixtral",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    gguf_mark="expert_count",
)
