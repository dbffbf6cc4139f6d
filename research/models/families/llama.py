"""Llama 2 and 3, and what is built like them: every switch at its default."""

from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields, read_rope, write_rope
from research.models.families.model_family import ModelFamily
from research.models.families.stored_tensor import StoredTensor

MOST_LAYERS = 10_000


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `LlamaConfig`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    embed = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    if heads % kv_heads:
        raise fields.wrong(
            "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads"
        )
    theta, scaling = read_rope(fields)
    return Architecture(
        vocab=fields.integer("vocab_size"),
        embed=embed,
        mlp=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers", high=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        # Rotary embeddings turn pairs.
        head_dim=fields.integer("head_dim", embed // heads, multiple_of=2),
        tied_head=fields.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.number("rms_norm_eps", 1e-6, high=1),
        max_position=fields.integer("max_position_embeddings", 2048),
    )


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `LlamaForCausalLM` reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocab,
        "hidden_size": a.embed,
        "intermediate_size": a.mlp,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "max_position_embeddings": a.max_position,
        "tie_word_embeddings": a.tied_head,
        "torch_dtype": "float32",
        **write_rope(a),
    }


def matrix(name: str, path: str, **rules: bool) -> StoredTensor:
    """A matrix as PyTorch's `Linear` stores it, `[out, in]`."""
    return StoredTensor(name, (path,), transposed=True, **rules)


def as_is(name: str, path: str) -> StoredTensor:
    """A vector, or the table of embeddings."""
    return StoredTensor(name, (path,))


HF_TENSORS = (
    as_is("model.embed_tokens.weight", "embedding.table"),
    as_is("model.norm.weight", "final_norm.scale"),
    matrix("lm_head.weight", "head.kernel"),
    as_is("model.layers.{}.input_layernorm.weight", "layers.attention_norm.scale"),
    matrix("model.layers.{}.self_attn.q_proj.weight", "layers.attention.query.kernel"),
    matrix("model.layers.{}.self_attn.k_proj.weight", "layers.attention.key.kernel"),
    matrix("model.layers.{}.self_attn.v_proj.weight", "layers.attention.value.kernel"),
    matrix("model.layers.{}.self_attn.o_proj.weight", "layers.attention.output.kernel"),
    as_is("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale"),
    matrix("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate.kernel"),
    matrix("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up.kernel"),
    matrix("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down.kernel"),
)

GGUF_TENSORS = (
    as_is("token_embd.weight", "embedding.table"),
    as_is("output_norm.weight", "final_norm.scale"),
    matrix("output.weight", "head.kernel"),
    as_is("blk.{}.attn_norm.weight", "layers.attention_norm.scale"),
    matrix(
        "blk.{}.attn_q.weight", "layers.attention.query.kernel", rotary_neighbours=True
    ),
    matrix(
        "blk.{}.attn_k.weight", "layers.attention.key.kernel", rotary_neighbours=True
    ),
    matrix("blk.{}.attn_v.weight", "layers.attention.value.kernel"),
    matrix("blk.{}.attn_output.weight", "layers.attention.output.kernel"),
    as_is("blk.{}.ffn_norm.weight", "layers.mlp_norm.scale"),
    matrix("blk.{}.ffn_gate.weight", "layers.mlp.gate.kernel"),
    matrix("blk.{}.ffn_up.weight", "layers.mlp.up.kernel"),
    matrix("blk.{}.ffn_down.weight", "layers.mlp.down.kernel"),
)

FAMILY = ModelFamily(
    model_type="llama",
    members="Llama 2 and 3, SmolLM2, TinyLlama",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=HF_TENSORS,
    # Old exports carry the rotary table, which is computed here.
    ignored_tensors=("rotary_emb.inv_freq",),
    gguf_architecture="llama",
    gguf_tensors=GGUF_TENSORS,
)
