"""A tiny random Llama as a Hugging Face folder, for tests of the whole commands."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# 256 bytes and three control tokens, rounded up to what meshes can split.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Writes config, weights and tokenizer into `folder`; `seed` draws the weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(random_weights(seed), folder / "model.safetensors")
    _tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def random_weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    embed, mlp = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = embed // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]

    def matrix(out: int, inputs: int) -> np.ndarray:
        return rng.normal(0.0, 0.1, (out, inputs)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(CONFIG["vocab_size"], embed),
        "lm_head.weight": matrix(CONFIG["vocab_size"], embed),
        "model.norm.weight": np.ones(embed, np.float32),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "input_layernorm": np.ones(embed, np.float32),
            "post_attention_layernorm": np.ones(embed, np.float32),
            "self_attn.q_proj": matrix(embed, embed),
            "self_attn.k_proj": matrix(kv, embed),
            "self_attn.v_proj": matrix(kv, embed),
            "self_attn.o_proj": matrix(embed, embed),
            "mlp.gate_proj": matrix(mlp, embed),
            "mlp.up_proj": matrix(mlp, embed),
            "mlp.down_proj": matrix(embed, mlp),
        }
        tensors |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
    return tensors


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in CONTROL]
    )
    return tokenizer
