"""Llama 2 and 3, and what is built like them: every switch at its default."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from research.models.architecture import Architecture, Rope
from research.models.families.config_fields import ConfigFields
from research.models.families.model_family import ModelFamily
from research.models.families.rope_fields import read_rope, write_rope
from research.models.families.stored_tensor import StoredTensor

MOST_LAYERS = 10_000
Names = Mapping[str, tuple[str, str]]


def read_shape(
    fields: ConfigFields,
    *,
    partial_rope: bool = False,
    rope_names: Mapping[str, str] = MappingProxyType({}),
    **switches: Any,
) -> Architecture:
    """Reads the fields that most families share with `LlamaConfig`.

    `switches` are fields of `Architecture` that the family sets itself; the other two
    arguments are those of `read_rope`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    if "activation" not in switches:
        fields.only("hidden_act", "silu")
    embed = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads, high=heads)
    if heads % kv_heads:
        raise fields.wrong(
            "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads"
        )
    head_dim = read_head_dim(fields)
    if "rope_theta" not in switches:
        rope = read_rope(fields, head_dim, partial=partial_rope, names=rope_names)
        switches |= rope_switches(rope)
    return Architecture(
        vocab=fields.integer("vocab_size"),
        embed=embed,
        mlp=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers", high=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied_head=fields.flag("tie_word_embeddings", False),
        norm_eps=fields.number("rms_norm_eps", 1e-6, high=1),
        max_position=fields.integer("max_position_embeddings", 2048),
        **({"biases": read_biases(fields)} | switches),
    )


def read_head_dim(fields: ConfigFields) -> int:
    """The width of a head, which the file may leave to others."""
    embed, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    # Rotary embeddings turn pairs.
    return fields.integer("head_dim", embed // heads, multiple_of=2)


def with_window(
    shape: Architecture, window: Mapping[str, Any], rope: Rope
) -> Architecture:
    """`shape` with the switches of `read_window`; its layers are turned by `rope`."""
    every = Rope(shape.rope_theta, shape.rope_scaling, shape.rope_fraction)
    other = rope if window and rope != every else None
    return dataclasses.replace(shape, window_rope=other, **window)


def rope_switches(rope: Rope) -> dict[str, Any]:
    """The switches that make `rope` the rotary embedding of all layers."""
    return {
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rope_fraction": rope.fraction,
    }


def read_biases(fields: ConfigFields) -> tuple[str, ...]:
    """The switch `biases` of families that name it in their config."""
    attention = ("qkv", "out") if fields.flag("attention_bias", False) else ()
    return (*attention, *(("mlp",) if fields.flag("mlp_bias", False) else ()))


def write_biases(a: Architecture) -> dict[str, Any]:
    """The fields that `read_biases` reads."""
    return {"attention_bias": "out" in a.biases, "mlp_bias": "mlp" in a.biases}


def write_shape(a: Architecture, model_type: str, model_class: str) -> dict[str, Any]:
    """The fields that `read_shape` reads, but those of biases."""
    return {
        "architectures": [model_class],
        "model_type": model_type,
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


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `LlamaForCausalLM` reads."""
    return write_shape(a, "llama", "LlamaForCausalLM") | write_biases(a)


# By our path: the name in Hugging Face's files, and in llama.cpp's.
MATRICES: Names = {
    "layers.attention.query.kernel": ("self_attn.q_proj", "attn_q"),
    "layers.attention.key.kernel": ("self_attn.k_proj", "attn_k"),
    "layers.attention.value.kernel": ("self_attn.v_proj", "attn_v"),
    "layers.attention.output.kernel": ("self_attn.o_proj", "attn_output"),
    "layers.mlp.gate.kernel": ("mlp.gate_proj", "ffn_gate"),
    "layers.mlp.up.kernel": ("mlp.up_proj", "ffn_up"),
    "layers.mlp.down.kernel": ("mlp.down_proj", "ffn_down"),
}
ENDS: Names = {
    "embedding.table": ("model.embed_tokens", "token_embd"),
    "final_norm.scale": ("model.norm", "output_norm"),
    "head.kernel": ("lm_head", "output"),
}
OUT_NORMS: Names = {
    "layers.attention_out_norm.scale": (
        "post_attention_layernorm",
        "post_attention_norm",
    ),
    "layers.mlp_out_norm.scale": ("post_feedforward_layernorm", "post_ffw_norm"),
}
QK_NORMS: Names = {
    "layers.attention.query_norm.scale": ("self_attn.q_norm", "attn_q_norm"),
    "layers.attention.key_norm.scale": ("self_attn.k_norm", "attn_k_norm"),
}


def biases(matrices: Names) -> Names:
    """The biases of `matrices`, which lie beside them."""
    return {f"{p.removesuffix('kernel')}bias": names for p, names in matrices.items()}


NAMES: Names = {
    **ENDS,
    "layers.attention_norm.scale": ("input_layernorm", "attn_norm"),
    **MATRICES,
    "layers.mlp_norm.scale": ("post_attention_layernorm", "ffn_norm"),
    **biases(MATRICES),
}
# llama.cpp lays both numbers of a rotary pair beside each other.
ROTARY = tuple(
    f"layers.attention.{what}.{part}"
    for what in ("query", "key")
    for part in ("kernel", "bias")
)


def stored(path: str, name: str, layer: str, **rules: Any) -> StoredTensor:
    """A tensor by PyTorch's rules: a `Linear` has its matrix as `[out, in]`."""
    prefix = layer if path.startswith("layers.") else ""
    is_matrix = path.endswith(".kernel")
    end = "bias" if path.endswith(".bias") else "weight"
    return StoredTensor(f"{prefix}{name}.{end}", (path,), is_matrix, **rules)


def hf_tensors(names: Names) -> tuple[StoredTensor, ...]:
    """A Hugging Face folder with a tensor for each parameter."""
    return tuple(
        stored(path, name, "model.layers.{}.") for path, (name, _) in names.items()
    )


def gguf_tensors(names: Names, norm_shift: float = 0.0) -> tuple[StoredTensor, ...]:
    """A llama.cpp file with a tensor for each parameter, in their own order of rows.

    Its scales of norms have `norm_shift` added.
    """
    return tuple(
        stored(
            path, name, "blk.{}.", shift=norm_shift if path.endswith(".scale") else 0.0
        )
        for path, (_, name) in names.items()
    )


HF_TENSORS = hf_tensors(NAMES)
GGUF_TENSORS = tuple(
    dataclasses.replace(tensor, rotary_neighbours=tensor.paths[0] in ROTARY)
    for tensor in gguf_tensors(NAMES)
)
GGUF_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}

FAMILY = ModelFamily(
    model_type="llama",
    members="Llama 2 and 3, SmolLM2, TinyLlama",
    from_hf_config=read_shape,
    to_hf_config=to_hf_config,
    hf_tensors=HF_TENSORS,
    # Old exports carry the rotary table, which is computed here.
    ignored_tensors=(r"rotary_emb\.inv_freq$",),
    gguf_architecture="llama",
    gguf_tensors=GGUF_TENSORS,
    gguf_fields=GGUF_FIELDS,
)
