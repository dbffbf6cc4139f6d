"""Shapes of the Llama family, by name or from a Hugging Face `config.json`."""

import dataclasses
from typing import Any

from research.core.errors import UserError, nearest

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than trained on.

    `linear`: Chen et al. 2023, arXiv:2306.15595. `llama3`: the Llama 3.1 release
    (wavelengths above `original_max_position / low_freq_factor` are divided by
    `factor`, those below `original_max_position / high_freq_factor` are kept, the
    ones between are interpolated).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a Llama-family decoder. Field names follow the legend in
    `attention.py`: D embed, F mlp, L layers, N heads, K kv_heads, H head_dim, V."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_head: bool
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    max_position: int = 2048

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} heads cannot share {self.kv_heads} key/value heads: "
                "heads must be a multiple of kv_heads"
            )


# Sizes count the vocabulary given here; pre-training takes its tokenizer's instead.
PRESETS = {
    "tiny": Architecture(
        vocab=256,
        embed=64,
        mlp=128,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        tied_head=True,
    ),
    "llama-6m": Architecture(
        vocab=4096,
        embed=256,
        mlp=768,
        layers=6,
        heads=4,
        kv_heads=4,
        head_dim=64,
        tied_head=True,
    ),
    "llama-125m": Architecture(
        vocab=32768,
        embed=768,
        mlp=2048,
        layers=14,
        heads=12,
        kv_heads=4,
        head_dim=64,
        tied_head=True,
    ),
    "llama-1b": Architecture(
        vocab=128256,
        embed=2048,
        mlp=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        tied_head=True,
        rope_theta=500000.0,
        max_position=8192,
    ),
    "smollm2-135m": Architecture(
        vocab=49152,
        embed=576,
        mlp=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        tied_head=True,
        rope_theta=100000.0,
        max_position=8192,
    ),
    "llama3.1-8b": Architecture(
        vocab=128256,
        embed=4096,
        mlp=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        tied_head=False,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
        max_position=131072,
    ),
    "llama3.1-70b": Architecture(
        vocab=128256,
        embed=8192,
        mlp=28672,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        tied_head=False,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
        max_position=131072,
    ),
}


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


def to_hf_config(a: Architecture) -> dict[str, Any]:
    """The `config.json` that Hugging Face's Llama reads; undone by `from_hf_config`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling.kind != "default":
        rope |= {"rope_type": a.rope_scaling.kind, "factor": a.rope_scaling.factor}
    if a.rope_scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": a.rope_scaling.low_freq_factor,
            "high_freq_factor": a.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": a.rope_scaling.original_max_position,
        }
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
        "rope_parameters": rope,
        "rope_theta": a.rope_theta,
        "max_position_embeddings": a.max_position,
        "tie_word_embeddings": a.tied_head,
        "torch_dtype": "float32",
    }


def from_hf_config(config: dict[str, Any]) -> Architecture:
    """Reads a Hugging Face `config.json` of the Llama family.

    Both spellings of the rotary settings are understood: `rope_parameters`
    (transformers 5) and `rope_theta` with `rope_scaling` (before).

    Raises:
      UserError: the file describes a computation this model does not do.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UserError(
            f"model_type {kind!r} is not supported; llama and mistral are "
            "(Llama 2 and 3, SmolLM2, TinyLlama, Mistral)"
        )
    _refuse_unknown_computation(config)
    missing = [name for name in NEEDED if name not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    heads = config["num_attention_heads"]
    theta, scaling = _rope(config)
    return Architecture(
        vocab=config["vocab_size"],
        embed=config["hidden_size"],
        mlp=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_position=_exact_context(config),
    )


def _exact_context(config: dict[str, Any]) -> int:
    """Longest context, in tokens, at which full attention is what was trained.

    A sliding window (Mistral v0.1) equals full attention up to its own length.
    """
    longest = config.get("max_position_embeddings", 2048)
    return min(longest, config.get("sliding_window") or longest)


def _refuse_unknown_computation(config: dict[str, Any]) -> None:
    """A model that computes something else must not load as if it did not."""
    only = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
    }
    for name, allowed in only.items():
        if config.get(name, allowed[0]) not in (*allowed, None):
            raise UserError(
                f"config.json has {name}={config[name]!r}; this model family is "
                f"computed only with {name}={allowed[0]!r}"
            )


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling]:
    rope = dict(config.get("rope_scaling") or {})
    rope.update(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"rope type {kind!r} is not supported; one of {', '.join(ROPE_TYPES)} is"
        )
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=rope["factor"])
    return theta, RopeScaling(
        kind=kind,
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )
