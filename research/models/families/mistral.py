"""Mistral 7B and its kin: Llama with a sliding window in the first release."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families import llama
from research.models.families.config_fields import ConfigFields


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `MistralConfig`.

    A sliding window (Mistral v0.1) equals full attention up to its own length, so
    that length becomes the longest context.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    shape = llama.from_hf_config(fields)
    window = fields.integer("sliding_window", shape.max_position)
    return dataclasses.replace(shape, max_position=min(shape.max_position, window))


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `MistralForCausalLM` reads."""
    return llama.to_hf_config(a) | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        # Its default is a window of 4096.
        "sliding_window": None,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    members="Mistral",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
)
