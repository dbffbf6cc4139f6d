"""GPT-NeoX, Pythia and Dolly 2: parallel branches, LayerNorm, a partly turned head."""

from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.dense import llama
from research.models.families.model_family import ModelFamily
from research.models.families.rope_fields import read_rope
from research.models.families.stored_tensor import StoredTensor

# By the names of Hugging Face; three of them are one function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_activation(fields: ConfigFields, name: str, default: str) -> str:
    """Our name of the activation of an MLP without a gate."""
    found = fields.text(name, default)
    if found not in ACTIVATIONS:
        raise fields.wrong(name, found, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def from_hf_config(fields: ConfigFields) -> Architecture:
    """Reads the fields of `GPTNeoXConfig`.

    Raises:
      UserError: a field is missing or malformed, or asks for another computation.
    """
    embed = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    if embed % heads:
        raise fields.wrong("num_attention_heads", heads, f"a divisor of {embed}")
    attention = ("qkv", "out") if fields.flag("attention_bias", True) else ()
    rope = fields.with_defaults(
        rope_theta=fields.get("rotary_emb_base", 10000.0),
        partial_rotary_factor=fields.get("rotary_pct", 0.25),
    )
    return Architecture(
        vocab=fields.integer("vocab_size"),
        embed=embed,
        mlp=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers", high=llama.MOST_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        tied_head=fields.flag("tie_word_embeddings", False),
        norm_eps=fields.number("layer_norm_eps", 1e-5, high=1),
        max_position=fields.integer("max_position_embeddings", 2048),
        norm="layer",
        parallel_residual=fields.flag("use_parallel_residual", True),
        biases=(*attention, "mlp"),
        activation=read_activation(fields, "hidden_act", "gelu"),
        gated_mlp=False,
        **llama.rope_switches(read_rope(rope, embed // heads, partial=True)),
    )


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that `GPTNeoXForCausalLM` reads."""
    config = llama.write_shape(a, "gpt_neox", "GPTNeoXForCausalLM")
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        del config[name]
    config["rope_parameters"]["partial_rotary_factor"] = a.rope_fraction
    return config | {
        "hidden_act": write_activation(a, "gelu_new"),
        "layer_norm_eps": a.norm_eps,
        "rotary_emb_base": a.rope_theta,
        "rotary_pct": a.rope_fraction,
        "use_parallel_residual": a.parallel_residual,
        "attention_bias": "out" in a.biases,
    }


def write_activation(a: Architecture, tanh: str) -> str:
    """Hugging Face's name of the activation; `tanh` is that of the approximation."""
    return tanh if a.activation == "gelu_tanh" else a.activation


LAYER = "gpt_neox.layers.{}."


QKV = tuple(f"layers.attention.{x}" for x in ("query", "key", "value"))


def both(
    name: str, *modules: str, transposed: bool = True, interleaved: bool = False
) -> tuple[StoredTensor, StoredTensor]:
    """A matrix, several with the same inputs, or a norm's scale; and the biases."""
    part = "scale" if modules[0].endswith("norm") else "kernel"

    def tensor(end: str, part: str) -> StoredTensor:
        paths = tuple(f"{module}.{part}" for module in modules)
        is_turned = transposed and part == "kernel"
        return StoredTensor(f"{name}.{end}", paths, is_turned, interleaved)

    return tensor("weight", part), tensor("bias", "bias")


GGUF_TENSORS = (
    StoredTensor("token_embd.weight", ("embedding.table",)),
    *both("blk.{}.attn_norm", "layers.attention_norm"),
    *both("blk.{}.attn_qkv", *QKV),
    *both("blk.{}.attn_output", "layers.attention.output"),
    *both("blk.{}.ffn_norm", "layers.mlp_norm"),
    *both("blk.{}.ffn_up", "layers.mlp.up"),
    *both("blk.{}.ffn_down", "layers.mlp.down"),
    *both("output_norm", "final_norm"),
    StoredTensor("output.weight", ("head.kernel",), transposed=True),
)

FAMILY = ModelFamily(
    model_type="gpt_neox",
    members="GPT-NeoX, Pythia and Dolly 2",
    from_hf_config=from_hf_config,
    to_hf_config=to_hf_config,
    hf_tensors=(
        StoredTensor("gpt_neox.embed_in.weight", ("embedding.table",)),
        *both(f"{LAYER}input_layernorm", "layers.attention_norm"),
        # Query, key and value of head 0, then those of head 1.
        *both(f"{LAYER}attention.query_key_value", *QKV, interleaved=True),
        *both(f"{LAYER}attention.dense", "layers.attention.output"),
        *both(f"{LAYER}post_attention_layernorm", "layers.mlp_norm"),
        *both(f"{LAYER}mlp.dense_h_to_4h", "layers.mlp.up"),
        *both(f"{LAYER}mlp.dense_4h_to_h", "layers.mlp.down"),
        *both("gpt_neox.final_layer_norm", "final_norm"),
        StoredTensor("embed_out.weight", ("head.kernel",), transposed=True),
    ),
    # Old files carry masks and the rotary table, which are computed here.
    ignored_tensors=(r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
    gguf_architecture="gptneox",
    gguf_tensors=GGUF_TENSORS,
    gguf_fields={
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    },
)
