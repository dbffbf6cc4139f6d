"""Qwen 3 with experts, such as Qwen3-30B-A3B."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import qwen
from research.models.families.experts.expert_fields import (
    GGUF_FIELDS,
    read_experts,
    with_experts,
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
    for name, usual in {"decoder_sparse_step": 1, "mlp_only_layers": []}.items():
        if fields.get(name, usual) != usual:
            # One scan runs all layers, so they have the same parameters. No released
            # model of the family mixes them.
            right = f"{usual}: all layers have experts here, or none has"
            raise fields.wrong(name, fields.get(name), right)
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


FAMILY = with_experts(
    qwen.QWEN3,
    "mlp.gate",
    MATRICES,
    model_type="qwen3_moe",
    members="Qwen 3 with experts",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    gguf_architecture="qwen3moe",
    gguf_fields={**GGUF_FIELDS, "expert_feed_forward_length": WIDTH},
    gguf_unsaid=lambda config: {"norm_topk_prob": True},
)
