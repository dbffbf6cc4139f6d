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


# By our path: the name in Hugging Face's files, and in llama.cpp's.
NAMES = {
    "embedding.table": ("model.embed_tokens", "token_embd"),
    "final_norm.scale": ("model.norm", "output_norm"),
    "head.kernel": ("lm_head", "output"),
    "layers.attention_norm.scale": ("input_layernorm", "attn_norm"),
    "layers.attention.query.kernel": ("self_attn.q_proj", "attn_q"),
    "layers.attention.key.kernel": ("self_attn.k_proj", "attn_k"),
    "layers.attention.value.kernel": ("self_attn.v_proj", "attn_v"),
    "layers.attention.output.kernel": ("self_attn.o_proj", "attn_output"),
    "layers.mlp_norm.scale": ("post_attention_layernorm", "ffn_norm"),
    "layers.mlp.gate.kernel": ("mlp.gate_proj", "ffn_gate"),
    "layers.mlp.up.kernel": ("mlp.up_proj", "ffn_up"),
    "layers.mlp.down.kernel": ("mlp.down_proj", "ffn_down"),
}
# llama.cpp lays both numbers of a rotary pair beside each other.
ROTARY = ("layers.attention.query.kernel", "layers.attention.key.kernel")


def stored(path: str, name: str, layer: str, **rules: bool) -> StoredTensor:
    """A tensor by PyTorch's rules: a `Linear` has its matrix as `[out, in]`."""
    prefix = layer if path.startswith("layers.") else ""
    is_matrix = path.endswith(".kernel")
    return StoredTensor(f"{prefix}{name}.weight", (path,), is_matrix, **rules)


HF_TENSORS = tuple(
    stored(path, name, "model.layers.{}.") for path, (name, _) in NAMES.items()
)
GGUF_TENSORS = tuple(
    stored(path, name, "blk.{}.", rotary_neighbours=path in ROTARY)
    for path, (_, name) in NAMES.items()
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
