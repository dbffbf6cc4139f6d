"""OLMo 2 (norms behind each branch, one norm over all heads) and OLMo 3 (windows)."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.layer_fields import layer_types, read_window
from research.models.families.model_family import ModelFamily
from research.models.families.rope_fields import read_ropes, write_ropes

SWITCHES = {"norm_at": "post", "qk_norm": "flat"}


def read_olmo2(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Olmo2Config`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("mlp_bias", False)
    return llama.read_shape(fields.with_defaults(rms_norm_eps=1e-5), **SWITCHES)


def read_olmo3(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Olmo3Config`: three layers of four have a window.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("mlp_bias", False)
    fields = fields.with_defaults(
        rms_norm_eps=1e-5, rope_theta=5e5, sliding_window=4096
    )
    ropes = read_ropes(fields, llama.read_head_dim(fields), 5e5)
    shape = llama.read_shape(fields, **SWITCHES, **llama.rope_switches(ropes[0]))
    window = read_window(fields, shape.layers, lambda layer: (layer + 1) % 4 != 0)
    return llama.with_window(shape, window, ropes[1])


def write_olmo2(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Olmo2ForCausalLM` reads."""
    config = llama.write_shape(a, "olmo2", "Olmo2ForCausalLM")
    return config | {"attention_bias": "out" in a.biases}


def write_olmo3(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Olmo3ForCausalLM` reads."""
    return llama.write_shape(a, "olmo3", "Olmo3ForCausalLM") | {
        "attention_bias": "out" in a.biases,
        "sliding_window": a.window or None,
        "layer_types": layer_types(a),
        **write_ropes(a),
    }


NAMES = {
    **llama.ENDS,
    **llama.MATRICES,
    **llama.biases(llama.MATRICES),
    **llama.QK_NORMS,
    **llama.OUT_NORMS,
}

OLMO2 = ModelFamily(
    model_type="olmo2",
    members="OLMo 2",
    from_hf_config=read_olmo2,
    to_hf_config=write_olmo2,
    hf_tensors=llama.hf_tensors(NAMES),
    gguf_architecture="olmo2",
    gguf_tensors=llama.gguf_tensors(NAMES),
    gguf_fields=llama.GGUF_FIELDS,
)
OLMO3 = dataclasses.replace(
    OLMO2,
    model_type="olmo3",
    members="OLMo 3",
    from_hf_config=read_olmo3,
    to_hf_config=write_olmo3,
    gguf_fields={
        **llama.GGUF_FIELDS,
        "attention.sliding_window": "sliding_window",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    gguf_mark="attention.sliding_window",
    gguf_period=4,
    gguf_unsaid=lambda config: {
        "rope_local_base_freq": config.get("rope_local_base_freq")
        or config["rope_theta"]
    },
)
