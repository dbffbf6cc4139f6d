"""Granite 3: Llama with four multipliers."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `GraniteConfig`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    return llama.read_shape(
        fields,
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        logit_divisor=fields.number("logits_scaling", 1.0),
    )


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `GraniteForCausalLM` reads."""
    return llama.write_shape(a, "granite", "GraniteForCausalLM") | {
        "embedding_multiplier": a.embedding_scale,
        "residual_multiplier": a.residual_scale,
        "attention_multiplier": a.attention_scale,
        "logits_scaling": a.logit_divisor,
        **llama.write_biases(a),
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="granite",
    members="Granite 3",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    gguf_architecture="granite",
    gguf_fields={
        **llama.GGUF_FIELDS,
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
)
