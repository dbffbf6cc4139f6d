"""SmolLM3: Llama in which every fourth layer has no rotary embedding."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.layer_fields import layer_types, read_window


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `SmolLM3Config`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    shape = llama.read_shape(
        fields.with_defaults(
            rope_theta=2e6,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            max_position_embeddings=32768,
        )
    )
    unrotated = _unrotated(fields, shape.layers)
    window = {}
    if fields.flag("use_sliding_window", False):
        window = read_window(fields, shape.layers, lambda layer: layer in unrotated)
    return dataclasses.replace(shape, unrotated_layers=unrotated, **window)


def _unrotated(fields: ConfigFields, layers: int) -> tuple[int, ...]:
    marks = fields.get("no_rope_layers")
    if marks is None:
        every = fields.integer("no_rope_layer_interval", 4)
        return tuple(range(every - 1, layers, every))
    known = isinstance(marks, list) and all(mark in (0, 1) for mark in marks)
    if not known or len(marks) < layers:
        right = f"{layers} times 1 (rotary embedding) or 0 (none)"
        raise fields.wrong("no_rope_layers", marks, right)
    return tuple(n for n in range(layers) if not marks[n])


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `SmolLM3ForCausalLM` reads."""
    return llama.write_shape(a, "smollm3", "SmolLM3ForCausalLM") | {
        "no_rope_layers": [int(n not in a.unrotated_layers) for n in range(a.layers)],
        "use_sliding_window": a.window > 0,
        "sliding_window": a.window or None,
        "layer_types": layer_types(a),
        **llama.write_biases(a),
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    members="SmolLM3",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    gguf_architecture="smollm3",
)
