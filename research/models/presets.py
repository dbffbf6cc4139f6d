"""Shapes for random weights, by the names that `config.model.preset` takes."""

import dataclasses

from research.core.errors import UserError, nearest
from research.models.architecture import Architecture, Experts, Rope, RopeScaling

# Sizes count the vocabulary given here; pre-training takes its tokenizer's instead. The
# shapes of released models are those of their config.json; mistral-7b is version 0.3.
PRESETS = {
    "tiny": Architecture(
        embed=64, mlp=128, layers=2, heads=4, kv_heads=4, head_dim=16,
        vocab=256, tied_head=True,
    ),
    "llama-6m": Architecture(
        embed=256, mlp=768, layers=6, heads=4, kv_heads=4, head_dim=64,
        vocab=4096, tied_head=True,
    ),
    "llama-125m": Architecture(
        embed=768, mlp=2048, layers=14, heads=12, kv_heads=4, head_dim=64,
        vocab=32768, tied_head=True,
    ),
    "llama-1b": Architecture(
        embed=2048, mlp=8192, layers=16, heads=32, kv_heads=8, head_dim=64,
        vocab=128256, tied_head=True, rope_theta=500000.0, max_position=8192,
    ),
    "smollm2-135m": Architecture(
        embed=576, mlp=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
        vocab=49152, tied_head=True, rope_theta=100000.0, max_position=8192,
    ),
    "smollm2-360m": Architecture(
        embed=960, mlp=2560, layers=32, heads=15, kv_heads=5, head_dim=64,
        vocab=49152, tied_head=True, rope_theta=100000.0, max_position=8192,
    ),
    "smollm2-1.7b": Architecture(
        embed=2048, mlp=8192, layers=24, heads=32, kv_heads=32, head_dim=64,
        vocab=49152, tied_head=True, rope_theta=130000.0, max_position=8192,
    ),
    "tinyllama-1.1b": Architecture(
        embed=2048, mlp=5632, layers=22, heads=32, kv_heads=4, head_dim=64,
        vocab=32000, tied_head=False,
    ),
    "llama2-7b": Architecture(
        embed=4096, mlp=11008, layers=32, heads=32, kv_heads=32, head_dim=128,
        vocab=32000, tied_head=False, max_position=4096,
    ),
    "llama3.2-1b": Architecture(
        embed=2048, mlp=8192, layers=16, heads=32, kv_heads=8, head_dim=64,
        vocab=128256, tied_head=True, rope_theta=500000.0, max_position=131072,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    ),
    "llama3.2-3b": Architecture(
        embed=3072, mlp=8192, layers=28, heads=24, kv_heads=8, head_dim=128,
        vocab=128256, tied_head=True, rope_theta=500000.0, max_position=131072,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    ),
    "llama3.1-8b": Architecture(
        embed=4096, mlp=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
        vocab=128256, tied_head=False, rope_theta=500000.0, max_position=131072,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    ),
    "llama3.1-70b": Architecture(
        embed=8192, mlp=28672, layers=80, heads=64, kv_heads=8, head_dim=128,
        vocab=128256, tied_head=False, rope_theta=500000.0, max_position=131072,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    ),
    "mistral-7b": Architecture(
        embed=4096, mlp=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
        vocab=32768, tied_head=False, rope_theta=1000000.0, max_position=32768,
        family="mistral",
    ),
    "qwen3-0.6b": Architecture(
        embed=1024, mlp=3072, layers=28, heads=16, kv_heads=8, head_dim=128,
        vocab=151936, tied_head=True, rope_theta=1000000.0, max_position=40960,
        norm_eps=1e-6, family="qwen3", qk_norm="head",
    ),
    "gemma3-270m": Architecture(
        embed=640, mlp=2048, layers=18, heads=4, kv_heads=1, head_dim=256,
        vocab=262144, tied_head=True, rope_theta=1000000.0, max_position=32768,
        norm_eps=1e-6, family="gemma3_text", qk_norm="head", norm_at="both",
        norm_shift=1.0, activation="gelu_tanh", attention_scale=256**-0.5,
        embedding_scale=640**0.5, window=512, window_rope=Rope(10000.0),
        window_layers=tuple(n for n in range(18) if (n + 1) % 6),
    ),
    "pythia-160m": Architecture(
        embed=768, mlp=3072, layers=12, heads=12, kv_heads=12, head_dim=64,
        vocab=50304, tied_head=False, rope_fraction=0.25, family="gpt_neox",
        norm="layer", parallel_residual=True, gated_mlp=False, activation="gelu",
        biases=("qkv", "out", "mlp"),
    ),
    "gpt2": Architecture(
        embed=768, mlp=3072, layers=12, heads=12, kv_heads=12, head_dim=64,
        vocab=50257, tied_head=True, max_position=1024, family="gpt2",
        positions="learned", norm="layer", gated_mlp=False, activation="gelu_tanh",
        biases=("qkv", "out", "mlp"),
    ),
    # As many matrices for each token as llama-6m and llama-125m have.
    "mixtral-6m": Architecture(
        embed=256, mlp=384, layers=6, heads=4, kv_heads=4, head_dim=64,
        vocab=4096, tied_head=True, family="mixtral",
        experts=Experts(8, 2, balance_weight=0.01),
    ),
    "mixtral-125m": Architecture(
        embed=768, mlp=1024, layers=14, heads=12, kv_heads=4, head_dim=64,
        vocab=32768, tied_head=True, family="mixtral",
        experts=Experts(8, 2, balance_weight=0.01),
    ),
    "mixtral-8x7b": Architecture(
        embed=4096, mlp=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
        vocab=32000, tied_head=False, rope_theta=1000000.0, max_position=32768,
        family="mixtral", experts=Experts(8, 2),
    ),
    "qwen3-30b-a3b": Architecture(
        embed=2048, mlp=768, layers=48, heads=32, kv_heads=4, head_dim=128,
        vocab=151936, tied_head=False, rope_theta=1000000.0, max_position=40960,
        norm_eps=1e-6, family="qwen3_moe", qk_norm="head", experts=Experts(128, 8),
    ),
    "olmoe-1b-7b": Architecture(
        embed=2048, mlp=1024, layers=16, heads=16, kv_heads=16, head_dim=128,
        vocab=50304, tied_head=False, max_position=4096, family="olmoe",
        qk_norm="flat", experts=Experts(64, 8, False, balance_weight=0.01),
    ),
    "gpt-oss-20b": Architecture(
        embed=2880, mlp=2880, layers=24, heads=64, kv_heads=8, head_dim=64,
        vocab=201088, tied_head=False, rope_theta=150000.0, max_position=131072,
        rope_scaling=RopeScaling(
            kind="yarn", factor=32.0, original_max_position=4096,
            attention_factor=1.3465735902799727, truncate=False,
        ),
        family="gpt_oss", biases=("qkv", "out", "router", "experts"), window=128,
        window_layers=tuple(range(0, 24, 2)), activation="clamped_swiglu",
        attention_sinks=True, experts=Experts(32, 4),
    ),
}  # fmt: skip


def preset(name: str, vocab: int = 0) -> Architecture:
    """The shape `name` with room for `vocab` ids, or for as many as it was made with.

    The table of embeddings is rounded up to a multiple of 128, so that it splits over
    a mesh and fills an accelerator's tiles; ids above `vocab` never occur.

    Raises:
      UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(
            f"config.model.preset is {name!r}{nearest(name, PRESETS)}; it must be one "
            f"of {', '.join(PRESETS)}"
        )
    known = PRESETS[name]
    return dataclasses.replace(known, vocab=-(-(vocab or known.vocab) // 128) * 128)
