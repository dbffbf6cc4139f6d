"""OLMoE: experts whose shares are not renormalised, one norm over all heads."""

from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama, qwen
from research.models.families.experts.expert_fields import (
    read_experts,
    with_experts,
    write_experts,
)
from research.models.families.experts.qwen3_moe import MATRICES


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `OlmoeConfig`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("clip_qkv", None)
    fields.only("mlp_bias", False)
    fields = fields.with_defaults(rms_norm_eps=1e-5, max_position_embeddings=4096)
    renormalized = fields.flag("norm_topk_prob", False)
    experts = read_experts(fields, 64, 8, 0.01, renormalized)
    return llama.read_shape(fields, qk_norm="flat", experts=experts)


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `OlmoeForCausalLM` reads."""
    return llama.write_shape(a, "olmoe", "OlmoeForCausalLM") | {
        "attention_bias": "out" in a.biases,
        "norm_topk_prob": a.experts.renormalized,
        **write_experts(a),
    }


FAMILY = with_experts(
    qwen.QWEN3,  # Its norms of queries and keys have the same names.
    "mlp.gate",
    MATRICES,
    model_type="olmoe",
    members="OLMoE",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    gguf_architecture="olmoe",
)
