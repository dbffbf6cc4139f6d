"""GPT-OSS: experts with biases and clamped gates, and a sink for each head."""

from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.experts.expert_fields import (
    GGUF_FIELDS,
    GGUF_MATRICES,
    GGUF_ROUTER,
    read_experts,
    without_mlp,
    write_experts,
)
from research.models.families.layer_fields import layer_types, read_window
from research.models.families.model_family import ModelFamily
from research.models.families.rope_fields import ORIGINAL
from research.models.families.stored_tensor import StoredTensor
from research.models.parts.layers import CLAMPED, GATE_LIMIT, GATE_SLOPE

ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, ORIGINAL: 4096,
}  # fmt: skip


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `GptOssConfig`; every second layer has a window.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("hidden_act", "silu")
    fields.only("swiglu_limit", GATE_LIMIT)
    fields.only("swiglu_alpha", GATE_SLOPE)
    fields.only("mlp_bias", False)
    fields = fields.with_defaults(
        rope_theta=150000.0, rms_norm_eps=1e-5, max_position_embeddings=131072,
        head_dim=64, sliding_window=128, attention_bias=True,
    )  # fmt: skip
    if fields.get("rope_parameters") is None:
        fields = fields.with_defaults(rope_scaling=ROPE)
    biases = llama.read_biases(fields)
    shape = llama.read_shape(
        fields,
        activation=CLAMPED,
        attention_sinks=True,
        biases=(*biases, "router", "experts"),
        experts=read_experts(fields, 128, 4, 0.001, True),
    )
    window = read_window(fields, shape.layers, lambda layer: layer % 2 == 0)
    return llama.with_window(shape, window, shape.ropes[0])


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `GptOssForCausalLM` reads."""
    return llama.write_shape(a, "gpt_oss", "GptOssForCausalLM") | {
        "attention_bias": "out" in a.biases,
        "sliding_window": a.window or None,
        "layer_types": layer_types(a),
        "swiglu_limit": GATE_LIMIT,
        **write_experts(a),
    }


def _stacked(name: str, *paths: str) -> StoredTensor:
    """A tensor of all experts: the columns of several matrices by turns."""
    return StoredTensor(
        f"model.layers.{{}}.mlp.experts.{name}",
        tuple(f"layers.mlp.{path}" for path in paths),
        interleaved=len(paths) > 1,
    )


def _unsaid(config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp rounds the ends of YaRN's ramp; the model was trained without."""
    rope = config["rope_scaling"]
    return {"rope_scaling": rope and {**rope, "truncate": False}}


# Named for where it lies: behind the attention.
GGUF_NAMES = {
    **llama.NAMES,
    "layers.mlp_norm.scale": ("post_attention_layernorm", "post_attention_norm"),
}

FAMILY = ModelFamily(
    model_type="gpt_oss",
    members="GPT-OSS",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=(
        *without_mlp(llama.HF_TENSORS),
        llama.stored("layers.router.kernel", "mlp.router", "model.layers.{}."),
        llama.stored("layers.router.bias", "mlp.router", "model.layers.{}."),
        StoredTensor("model.layers.{}.self_attn.sinks", ("layers.attention.sinks",)),
        _stacked("gate_up_proj", "gate.kernel", "up.kernel"),
        _stacked("gate_up_proj_bias", "gate.bias", "up.bias"),
        _stacked("down_proj", "down.kernel"),
        _stacked("down_proj_bias", "down.bias"),
    ),
    quantised_as=("mxfp4",),
    gguf_architecture="gpt-oss",
    gguf_tensors=(
        *without_mlp(llama.gguf_tensors(GGUF_NAMES)),
        llama.stored("layers.attention.sinks", "attn_sinks", "blk.{}."),
        *GGUF_ROUTER,
        *GGUF_MATRICES,
    ),
    gguf_fields={
        **GGUF_FIELDS,
        "expert_feed_forward_length": "intermediate_size",
        "attention.sliding_window": "sliding_window",
    },
    gguf_period=2,
    gguf_unsaid=_unsaid,
)
