"""Mistral 7B and its kin: Llama with a sliding window in the first release."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.layer_fields import read_window


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `MistralConfig`, whose window is that of every layer.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields = fields.with_defaults(sliding_window=4096)
    shape = llama.read_shape(fields)
    window = read_window(fields, shape.layers, lambda layer: True)
    return dataclasses.replace(shape, **window)


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `MistralForCausalLM` reads."""
    return llama.write_shape(a, "mistral", "MistralForCausalLM") | {
        "sliding_window": a.window or None,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    members="Mistral",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
)
