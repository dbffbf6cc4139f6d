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
    """A tiny model: the name of its folder, and what its config changes in SHAPE."""

    name: str
    model_type: str
    changes: dict[str, Any]
    norm_mean: float = 1.0

    @property
    def seed(self) -> int:
        return sum(self.name.encode())


def rope(theta: float = 10000.0, kind: str = "default", **fields: Any) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **fields}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
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
]  # fmt: skip


def config_of(tiny: Tiny) -> Any:
    return AutoConfig.for_model(tiny.model_type, **SHAPE | tiny.changes)


def written(tiny: Tiny) -> tuple[dict[str, Any], dict[str, list[int]], PreTrainedModel]:
    """The config and tensor names that transformers writes, and the seeded model."""
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config_of(tiny)).save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        shapes = {name: list(x.shape) for name, x in sorted(load_file(file).items())}
        weights = make_weights(shapes, tiny.seed, tiny.norm_mean)
        save_file(weights, file, metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
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
    return recorded | continue_prompt(model, make_prompt)


def write_tiny(tiny: Tiny, root: Path) -> None:
    folder = root / FOLDER / tiny.name
    folder.mkdir(parents=True, exist_ok=True)
    config, shapes, model = written(tiny)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    facts = {"seed": tiny.seed, "norm_mean": tiny.norm_mean, "shapes": shapes}
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
    if json.loads((folder / "tensors.json").read_text())["shapes"] != shapes:
        faults.append("tensor names differ")
    return arrays_of(tiny, model), faults
