"""Qwen 3 with experts, such as Qwen3-30B-A3B."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import qwen
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

WIDTH = "moe_intermediate_size"
MATRICES = {own: f"mlp.experts.{{}}.{own}_proj" for own in ("gate", "up", "down")}


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Qwen3MoeConfig`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation, such
        as layers without experts.
    """
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    renormalized = fields.flag("norm_topk_prob", False)
    experts = read_experts(fields, 128, 8, 0.001, renormalized)
    shape = dataclasses.replace(qwen.read_qwen3(fields), experts=experts)
    return dataclasses.replace(shape, mlp=fields.integer(WIDTH, 768))


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Qwen3MoeForCausalLM` reads."""
    return qwen.write_qwen3(a) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        WIDTH: a.mlp,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": a.experts.renormalized,
        **write_experts(a),
    }


SHARED = without_mlp(qwen.QWEN3.hf_tensors)
FAMILY = dataclasses.replace(
    qwen.QWEN3,
    model_type="qwen3_moe",
    members="Qwen 3 with experts",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=SHARED + expert_tensors("mlp.gate", MATRICES),
    other_hf_tensors=(SHARED + STACKED,),
    gguf_architecture="qwen3moe",
    gguf_tensors=(*without_mlp(qwen.QWEN3.gguf_tensors), *GGUF_ROUTER, *GGUF_MATRICES),
    gguf_fields={**GGUF_FIELDS, "expert_feed_forward_length": WIDTH},
    gguf_unsaid=lambda config: {"norm_topk_prob": True},
)
