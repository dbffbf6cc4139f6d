"""Fields of configs and names of tensors that families with experts share."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture, Experts
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor

BALANCE = "router_aux_loss_coef"
MOST_EXPERTS = 100_000
# How many there are: releases of transformers write one or the other.
COUNTS = ("num_local_experts", "num_experts")


def read_experts(
    fields: ConfigFields, count: int, chosen: int, balance: float, renormalized: bool
) -> Experts:
    """The experts of each layer.

    Args:
      fields: the whole file.
      count: how many there are where the file has neither of `COUNTS`.
      chosen: likewise, of each token.
      balance: the weight of the balance loss where the file has none. As in
        transformers it counts only with `output_router_logits`.
      renormalized: see `Experts`.

    Raises:
      UserError: a field is missing or malformed.
    """
    name = COUNTS[fields.get(COUNTS[0]) is None]
    experts = fields.integer(name, count, high=MOST_EXPERTS)
    weight = 0.0
    if fields.flag("output_router_logits", False) and fields.get(BALANCE) != 0:
        weight = fields.number(BALANCE, balance)
    return Experts(
        count=experts,
        chosen=fields.integer("num_experts_per_tok", chosen, high=experts),
        renormalized=renormalized,
        balance_weight=weight,
    )


def write_experts(a: Architecture) -> dict[str, Any]:
    """The fields that `read_experts` reads."""
    return {
        **dict.fromkeys(COUNTS, a.experts.count),
        "num_experts_per_tok": a.experts.chosen,
        "output_router_logits": a.experts.balance_weight > 0,
        BALANCE: a.experts.balance_weight,
    }


# The fields of llama.cpp's metadata beside those of Llama.
GGUF_FIELDS = {
    **llama.GGUF_FIELDS,
    "expert_count": COUNTS[0],
    "expert_used_count": "num_experts_per_tok",
}
# llama.cpp has one tensor for all experts of a layer, `[E, out, in]`.
GGUF_MATRICES = tuple(
    llama.stored(f"layers.mlp.{own}.{part}", f"ffn_{own}_exps", "blk.{}.")
    for own in ("gate", "up", "down")
    for part in ("kernel", "bias")
)
GGUF_ROUTER = tuple(
    llama.stored(f"layers.router.{part}", "ffn_gate_inp", "blk.{}.")
    for part in ("kernel", "bias")
)

# As transformers 5 holds them in memory: gate and up of all experts in one tensor.
STACKED = (
    StoredTensor(
        "model.layers.{}.mlp.gate.weight", ("layers.router.kernel",), transposed=True
    ),
    StoredTensor(
        "model.layers.{}.mlp.experts.gate_up_proj",
        ("layers.mlp.gate.kernel", "layers.mlp.up.kernel"),
        transposed=True,
    ),
    StoredTensor(
        "model.layers.{}.mlp.experts.down_proj",
        ("layers.mlp.down.kernel",),
        transposed=True,
    ),
)
# Until April 2024 it had one for each expert. It has not loaded those since October.
GGUF_PER_EXPERT = tuple(
    llama.stored(f"layers.mlp.{own}.kernel", f"ffn_{own}.{{}}", "blk.{}.")
    for own in ("gate", "up", "down")
)


def with_experts(
    dense: ModelFamily, router: str, matrices: dict[str, str], **changes: Any
) -> ModelFamily:
    """A family that has a router and experts in the place of each MLP of `dense`.

    Args:
      dense: names everything else.
      router: the module of a layer.
      matrices: those of one expert by our names; `{}` stands for its number.
      changes: other fields in which the family differs.
    """
    shared = without_mlp(dense.hf_tensors)
    per_expert = (
        _of_layer(router, "router"),
        *(_of_layer(name, f"mlp.{own}") for own, name in matrices.items()),
    )
    of_llama_cpp = (*without_mlp(dense.gguf_tensors), *GGUF_ROUTER)
    names: dict[str, Any] = {
        "hf_tensors": shared + per_expert,
        "other_hf_tensors": (shared + STACKED,),
        "gguf_tensors": of_llama_cpp + GGUF_MATRICES,
        "other_gguf_tensors": (of_llama_cpp + GGUF_PER_EXPERT,),
        "gguf_fields": GGUF_FIELDS,
    }
    return dataclasses.replace(dense, **names | changes)


def _of_layer(name: str, own: str) -> StoredTensor:
    path = f"layers.{own}.kernel"
    return StoredTensor(f"model.layers.{{}}.{name}.weight", (path,), transposed=True)


def without_mlp(tensors: tuple[StoredTensor, ...]) -> tuple[StoredTensor, ...]:
    """Those of a dense family that a family with experts has, too."""
    return tuple(t for t in tensors if not t.paths[0].startswith("layers.mlp."))
