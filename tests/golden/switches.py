"""Tiny models that use each switch of a family: config, tensor names, outputs.

Their weights follow from a seed (`seeded_weights.py`), so a folder takes a few kB.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Arrays, continue_prompt, forward, require
from rounding_error import rounding_error
from safetensors.numpy import load_file, save_file
from seeded_weights import make_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOLERANCE = 1e-4
LENGTH, EVERY = 48, 6
FOLDER = "switches"
SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model: the name of its folder, and what its config changes in SHAPE.

    `long_row`: tokens of a row longer than the original context, or 0.
    """

    name: str
    model_type: str
    changes: dict[str, Any]
    norm_mean: float = 1.0
    long_row: int = 0

    @property
    def seed(self) -> int:
        return sum(self.name.encode())


def rope(theta: float = 10000.0, kind: str = "default", **fields: Any) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **fields}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {
    "head_dim": 8, "query_pre_attn_scalar": 3, "sliding_window": 7,
    "rms_norm_eps": 1e-3, "pad_token_id": None,
}  # fmt: skip
# Epsilons are far from any default, so that a reader which ignores one shows.
TINY = [
    Tiny(
        "qwen2", "qwen2",
        {"rms_norm_eps": 1e-3, "rope_parameters": rope(kind="yarn", **YARN)},
    ),
    Tiny(
        "qwen2_window", "qwen2",
        {
            "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
            "tie_word_embeddings": True, "rope_parameters": rope(1e6),
        },
    ),
    Tiny(
        "qwen3", "qwen3",
        {"head_dim": 8, "rms_norm_eps": 1e-3, "rope_parameters": rope(1e6)},
    ),
    Tiny(
        "olmo2", "olmo2",
        {"pad_token_id": None, "rms_norm_eps": 1e-3, "rope_parameters": rope(5e5)},
    ),
    Tiny(
        "olmo3", "olmo3",
        {
            "pad_token_id": None, "num_hidden_layers": 4, "sliding_window": 7,
            "rope_parameters": {
                "sliding_attention": rope(5e5),
                "full_attention": rope(5e5, "yarn", **YARN),
            },
        },
    ),
    Tiny(
        "granite", "granite",
        {
            "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7, "attention_multiplier": 0.9,
            "logits_scaling": 1.7, "rope_parameters": rope(kind="linear", factor=2.0),
        },
    ),
    Tiny(
        "smollm3", "smollm3",
        {
            "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0],
            "pad_token_id": None, "use_sliding_window": True, "sliding_window": 7,
            "rope_parameters": rope(2e6),
        },
    ),
    Tiny(
        "phi3", "phi3",
        {
            "head_dim": 8, "sliding_window": 9, "pad_token_id": None,
            "rope_parameters": rope(partial_rotary_factor=0.75),
        },
    ),
    Tiny(
        "phi3_longrope", "phi3",
        {
            "num_attention_heads": 2, "pad_token_id": None,
            "tie_word_embeddings": True, "max_position_embeddings": 512,
            "original_max_position_embeddings": 160,
            "rope_parameters": rope(
                kind="longrope", partial_rotary_factor=0.75,
                short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 4.0],
            ),
        },
        long_row=170,
    ),
    Tiny(
        "gemma2", "gemma2",
        {
            **GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 9.0,
            "rope_parameters": rope(),
        },
        norm_mean=1.5,
    ),
    Tiny(
        "gemma3", "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": rope(100.0),
                "full_attention": rope(1e6, "linear", factor=8.0),
            },
        },
        norm_mean=1.5,
    ),
    Tiny(
        "gpt_neox", "gpt_neox",
        {
            "num_attention_heads": 2, "layer_norm_eps": 1e-3,
            "rope_parameters": rope(partial_rotary_factor=0.25),
        },
    ),
    Tiny(
        "gpt_neox_serial", "gpt_neox",
        {
            "num_attention_heads": 2, "use_parallel_residual": False,
            "attention_bias": False, "hidden_act": "gelu_new",
            "rope_parameters": rope(partial_rotary_factor=1.0),
        },
    ),
    Tiny(
        "mixtral", "mixtral",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-3,
            "output_router_logits": True, "router_aux_loss_coef": 0.02,
            "sliding_window": 9, "rope_parameters": rope(1e6),
        },
    ),
    Tiny(
        "qwen3_moe", "qwen3_moe",
        {
            "head_dim": 8, "rms_norm_eps": 1e-3, "intermediate_size": 12,
            "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3,
            "norm_topk_prob": True, "output_router_logits": True,
            "rope_parameters": rope(1e6),
        },
    ),
    Tiny(
        "olmoe", "olmoe",
        {
            "pad_token_id": None, "rms_norm_eps": 1e-3, "num_experts": 5,
            "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0,
            "rope_parameters": rope(5e4),
        },
    ),
    Tiny(
        "gpt_oss", "gpt_oss",
        {
            "head_dim": 8, "rms_norm_eps": 1e-3, "num_local_experts": 4,
            "num_experts_per_tok": 2, "output_router_logits": True,
            "sliding_window": 7, "num_hidden_layers": 4, "pad_token_id": None,
            "rope_parameters": rope(1.5e5, "yarn", truncate=False, **YARN),
        },
    ),
    Tiny("gpt2", "gpt2", {"n_inner": 24, "layer_norm_epsilon": 1e-3}),
]  # fmt: skip


def config_of(tiny: Tiny) -> Any:
    known = AutoConfig.for_model(tiny.model_type)
    shape = {name: value for name, value in SHAPE.items() if hasattr(known, name)}
    return AutoConfig.for_model(tiny.model_type, **shape | tiny.changes)


def written(
    tiny: Tiny, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, list[int]], PreTrainedModel]:
    """The config and tensor names that transformers writes, and the seeded model."""
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config_of(tiny)).save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        shapes = {name: list(x.shape) for name, x in sorted(load_file(file).items())}
        weights = make_weights(shapes, tiny.seed, tiny.norm_mean)
        save_file(weights, file, metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        config = json.loads(Path(folder, "config.json").read_text())
    return config, shapes, model.eval()


def arrays_of(tiny: Tiny, model: PreTrainedModel) -> Arrays:
    """The arrays of `expected.npz`.

    Raises:
        RuntimeError: the logits or the attention are too flat to test anything.
    """
    vocab = model.config.get_text_config().vocab_size
    tokens = np.random.RandomState(tiny.seed).randint(0, vocab, (2, LENGTH))
    logits = forward(model, tokens)
    require(float(logits.std()) > 0.7, f"{tiny.name}: logits are flat, {logits.std()}")
    earlier = tokens.copy()
    earlier[:, -5] = (earlier[:, -5] + 1) % vocab
    change = (forward(model, earlier) - logits)[:, -1].abs().max()
    require(float(change) > 1e-2, f"{tiny.name}: attention is flat, {change}")

    def make_prompt(index: int) -> np.ndarray:
        return np.random.RandomState([tiny.seed, index]).randint(0, vocab, (1, 8))

    recorded = {
        "tokens": tokens.astype(np.int32),
        "logits": logits.numpy()[:, EVERY - 1 :: EVERY],
    }
    if tiny.long_row:
        row = np.resize(tokens, (1, tiny.long_row)).astype(np.int32)
        recorded |= {"long": row, "long_logits": forward(model, row).numpy()[:, -4:]}
    return recorded | continue_prompt(model, make_prompt)


def half_error(tiny: Tiny) -> float:
    """The rounding error of transformers in bfloat16, see `rounding_error`."""
    model = written(tiny, torch.bfloat16)[2]
    vocab = model.config.get_text_config().vocab_size
    tokens = np.random.RandomState(tiny.seed).randint(0, vocab, (2, LENGTH))
    found = forward(model, tokens).float().numpy()
    exact = forward(model.float(), tokens).numpy()
    return rounding_error(*(x[:, EVERY - 1 :: EVERY] for x in (found, exact)))


def write_tiny(tiny: Tiny, root: Path) -> None:
    folder = root / FOLDER / tiny.name
    folder.mkdir(parents=True, exist_ok=True)
    config, shapes, model = written(tiny)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    facts = {"seed": tiny.seed, "norm_mean": tiny.norm_mean, "shapes": shapes}
    facts["half_error"] = round(half_error(tiny), 6)
    (folder / "tensors.json").write_text(json.dumps(facts) + "\n")
    np.savez_compressed(folder / "expected.npz", **arrays_of(tiny, model))


def read_tiny(tiny: Tiny, root: Path) -> tuple[Arrays, list[str]]:
    """Outputs computed again, and what is wrong with the files of the folder."""
    folder = root / FOLDER / tiny.name
    config, shapes, model = written(tiny)
    faults = []
    stored = json.loads((folder / "config.json").read_text())
    # The version alone may differ, when newer pins are being tried.
    if stored | {"transformers_version": config["transformers_version"]} != config:
        faults.append("config.json differs")
    facts = json.loads((folder / "tensors.json").read_text())
    if facts["shapes"] != shapes:
        faults.append("tensor names differ")
    if abs(half_error(tiny) / facts["half_error"] - 1) > 0.05:
        faults.append("the rounding error in bfloat16 differs")
    return arrays_of(tiny, model), faults
