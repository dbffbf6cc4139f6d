"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama in files that fuse matrices."""

import dataclasses
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.layer_fields import read_window
from research.models.families.model_family import ModelFamily
from research.models.families.rope_fields import ORIGINAL
from research.models.families.stored_tensor import StoredTensor

# The first releases call LongRoPE by these names.
OLD_NAMES = {"su": "longrope", "yarn": "longrope"}


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `Phi3Config`; a window is that of every layer.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields = fields.with_defaults(
        rms_norm_eps=1e-5, max_position_embeddings=4096, **{ORIGINAL: 4096}
    )
    shape = llama.read_shape(fields, partial_rope=True, rope_names=OLD_NAMES)
    window = read_window(fields, shape.layers, lambda layer: True)
    return dataclasses.replace(shape, **window)


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `Phi3ForCausalLM` reads."""
    original = {}
    if a.rope_scaling.kind == "longrope":
        original[ORIGINAL] = a.rope_scaling.original_max_position
    return llama.write_shape(a, "phi3", "Phi3ForCausalLM") | {
        "sliding_window": a.window or None,
        **original,
    }


def _fuse(
    tensors: tuple[StoredTensor, ...], layer: str, qkv: str, gate_up: str
) -> tuple[StoredTensor, ...]:
    """Llama's `tensors`, with all outputs of one matrix and then all of the next."""
    attention = tuple(
        f"layers.attention.{name}.kernel" for name in ("query", "key", "value")
    )
    mlp = ("layers.mlp.gate.kernel", "layers.mlp.up.kernel")
    return (
        StoredTensor(f"{layer}{qkv}.weight", attention, transposed=True),
        StoredTensor(f"{layer}{gate_up}.weight", mlp, transposed=True),
        *(
            tensor
            for tensor in tensors
            if not {*tensor.paths} & {*attention, *mlp}
            and not tensor.name.endswith(".bias")
        ),
    )


FAMILY = ModelFamily(
    model_type="phi3",
    members="Phi-3, Phi-4 and Phi-4-mini",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=_fuse(
        llama.HF_TENSORS, "model.layers.{}.", "self_attn.qkv_proj", "mlp.gate_up_proj"
    ),
    gguf_architecture="phi3",
    gguf_tensors=_fuse(
        llama.gguf_tensors(llama.NAMES), "blk.{}.", "attn_qkv", "ffn_up"
    ),
    gguf_fields={**llama.GGUF_FIELDS, "attention.sliding_window": "sliding_window"},
)
