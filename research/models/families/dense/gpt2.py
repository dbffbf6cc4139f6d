"""GPT-2: learned positions, LayerNorm, and matrices that lie as they multiply."""

import functools
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.dense.gpt_neox import (
    GGUF_TENSORS,
    QKV,
    both,
    read_activation,
    write_activation,
)
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `GPT2Config`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    embed, heads = fields.integer("n_embd"), fields.integer("n_head")
    if embed % heads:
        raise fields.wrong("n_head", heads, f"a divisor of {embed}")
    return Architecture(
        vocab=fields.integer("vocab_size"),
        embed=embed,
        mlp=fields.integer("n_inner", 4 * embed),
        layers=fields.integer("n_layer", high=llama.MOST_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        tied_head=fields.flag("tie_word_embeddings", True),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, high=1),
        max_position=fields.integer("n_positions", 1024),
        positions="learned",
        norm="layer",
        biases=("qkv", "out", "mlp"),
        activation=read_activation(fields, "activation_function", "gelu_new"),
        gated_mlp=False,
    )


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `GPT2LMHeadModel` reads."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": a.vocab,
        "n_embd": a.embed,
        "n_inner": a.mlp,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_positions": a.max_position,
        "n_ctx": a.max_position,
        "activation_function": write_activation(a, "gelu_new"),
        "layer_norm_epsilon": a.norm_eps,
        "tie_word_embeddings": a.tied_head,
        "torch_dtype": "float32",
    }


# Matrices lie `[in, out]`.
_both = functools.partial(both, transposed=False)
LAYER = "transformer.h.{}."

FAMILY = ModelFamily(
    model_type="gpt2",
    members="GPT-2",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=(
        StoredTensor("transformer.wte.weight", ("embedding.table",)),
        StoredTensor("transformer.wpe.weight", ("position_embedding.table",)),
        *_both(f"{LAYER}ln_1", "layers.attention_norm"),
        *_both(f"{LAYER}attn.c_attn", *QKV),
        *_both(f"{LAYER}attn.c_proj", "layers.attention.output"),
        *_both(f"{LAYER}ln_2", "layers.mlp_norm"),
        *_both(f"{LAYER}mlp.c_fc", "layers.mlp.up"),
        *_both(f"{LAYER}mlp.c_proj", "layers.mlp.down"),
        *_both("transformer.ln_f", "final_norm"),
        StoredTensor("lm_head.weight", ("head.kernel",), transposed=True),
    ),
    # The files of the first release have no prefix.
    beginnings=("transformer.", ""),
    # Old files carry masks.
    ignored_tensors=(r"\.attn\.(masked_)?bias$",),
    gguf_architecture="gpt2",
    gguf_tensors=(
        StoredTensor("position_embd.weight", ("position_embedding.table",)),
        *GGUF_TENSORS,
    ),
    gguf_fields={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
)
