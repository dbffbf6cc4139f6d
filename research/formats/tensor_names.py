"""One name table between our parameters, Hugging Face tensors and GGUF tensors."""

import numpy as np

from research.weights.parameter_spec import Spec

# Our path -> Hugging Face's name; {} is the layer. Every file kind speaks these.
HF_NAMES = {
    "embedding.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.query.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attention.key.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attention.value.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attention.output.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down.kernel": "model.layers.{}.mlp.down_proj.weight",
}
# llama.cpp's name -> Hugging Face's, without prefix and layer.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def to_hf_layout(path: str, kernel: np.ndarray) -> np.ndarray:
    """One layer's parameter as Hugging Face stores it: matrices are [out, in]."""
    if path == "embedding.table" or kernel.ndim == 1:
        return kernel
    n_in = 2 if path == "layers.attention.output.kernel" else 1
    inputs = int(np.prod(kernel.shape[:n_in]))
    return kernel.reshape(inputs, -1).T


def from_hf_layout(path: str, tensor: np.ndarray, spec: Spec) -> np.ndarray:
    """Undoes `to_hf_layout`: `tensor` as one layer of `spec`."""
    if path == "embedding.table" or tensor.ndim == 1:
        return tensor
    return tensor.T.reshape(spec.shape[spec.stacked :])
