"""OLMoE: experts whose shares are not renormalised, one norm over all heads."""

from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.experts.expert_fields import (
    GGUF_FIELDS,
    GGUF_MATRICES,
    GGUF_ROUTER,
    STACKED,
    expert_tensors,
    read_experts,
    without_mlp,
    write_experts,
)
from research.models.families.experts.qwen3_moe import MATRICES
from research.models.families.model_family import ModelFamily


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


NAMES = {**llama.NAMES, **llama.QK_NORMS}
SHARED = without_mlp(llama.hf_tensors(NAMES))
FAMILY = ModelFamily(
    model_type="olmoe",
    members="OLMoE",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=SHARED + expert_tensors("mlp.gate", MATRICES),
    other_hf_tensors=(SHARED + STACKED,),
    ignored_tensors=llama.FAMILY.ignored_tensors,
    gguf_architecture="olmoe",
    gguf_tensors=(
        *without_mlp(llama.gguf_tensors(NAMES)),
        *GGUF_ROUTER,
        *GGUF_MATRICES,
    ),
    gguf_fields=GGUF_FIELDS,
)
