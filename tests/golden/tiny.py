"""Tiny random Llama-family models, stored whole: config, weights and outputs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import Arrays, continue_prompt, forward, require
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

TOLERANCE = 1e-4

# Wide enough that attention picks out positions and logits spread over several units.
LINEAR_STD = 0.25
EMBEDDING_STD = 0.3
NORM_STD = 0.2


@dataclass(frozen=True)
class Family:
    """A tiny random model: its configuration, weight seed and way of being stored."""

    name: str
    config: PretrainedConfig
    seed: int
    max_shard: str = "1MB"
    shards: int = 1
    legacy: bool = False


def families() -> list[Family]:
    """The five tiny models. Sizes within one differ, so that a transposition shows."""
    base: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 128}
    smollm2 = LlamaConfig(
        **base, vocab_size=144, hidden_size=48, intermediate_size=64,
        num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    llama2 = LlamaConfig(
        **base, vocab_size=128, hidden_size=32, intermediate_size=80,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    # With head_dim 24 the rotary wavelengths are 6.3, 19, 56, ...: the first is below
    # 32/4 and kept, the second is between 32/4 and 32/1 and blended, the rest scaled.
    llama3 = LlamaConfig(
        **base, vocab_size=136, hidden_size=48, intermediate_size=56,
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )  # fmt: skip
    tinyllama = LlamaConfig(
        **base, vocab_size=128, hidden_size=48, intermediate_size=64,
        num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    # The epsilon is far from any default, so that a reader which ignores it shows.
    mistral = MistralConfig(
        **base, vocab_size=128, hidden_size=48, intermediate_size=56,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return [
        Family("smollm2", smollm2, 11),
        Family("llama2", llama2, 12, max_shard="80KB", shards=2),
        Family("llama3", llama3, 13, legacy=True),
        Family("tinyllama", tinyllama, 14),
        Family("mistral", mistral, 15),
    ]


def build(family: Family, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The family's model with its seeded weights, under another config if given."""
    model = AutoModelForCausalLM.from_config(
        config or family.config, dtype=torch.float32, attn_implementation="eager"
    )
    rng = np.random.default_rng(family.seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
        if parameter.dim() == 1:
            value = 1.0 + NORM_STD * noise
        else:
            value = noise * (EMBEDDING_STD if "embed_tokens" in name else LINEAR_STD)
        parameter.data.copy_(torch.from_numpy(value.astype(np.float32)))
    return model.eval()


def tiny_arrays(family: Family, model: PreTrainedModel) -> Arrays:
    """The arrays of `expected.npz` for a tiny family.

    Raises:
        RuntimeError: the logits or the attention are too flat to test anything.
    """
    vocab = family.config.vocab_size
    rng = np.random.default_rng([family.seed, 0])
    tokens = rng.integers(0, vocab, (2, 48)).astype(np.int32)
    logits = forward(model, tokens)
    require(float(logits.std()) > 1, f"{family.name}: logits are too flat")
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        attentions = model(input_ids=ids, output_attentions=True).attentions
    for weights in attentions:
        entropy = -torch.special.xlogy(weights[:, :, -1], weights[:, :, -1]).sum(-1)
        flat = float(entropy.mean()) / math.log(tokens.shape[1])
        require(flat < 0.8, f"{family.name}: attention entropy is {flat} of uniform")

    def make_prompt(index: int) -> np.ndarray:
        return np.random.default_rng([family.seed, 1, index]).integers(0, vocab, (1, 8))

    recorded = {"tokens": tokens, "logits": logits.numpy()}
    return recorded | continue_prompt(model, make_prompt)


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration under the keys that transformers wrote before 5.0."""
    # Llama 3 and 3.1 were published without head_dim, so it is left to the reader too.
    newer = ("rope_parameters", "dtype", "head_dim", "transformers_version")
    legacy = {key: value for key, value in config.items() if key not in newer}
    scaling = dict(config["rope_parameters"])
    legacy["rope_theta"] = scaling.pop("rope_theta")
    legacy["rope_scaling"] = scaling
    legacy["torch_dtype"] = config["dtype"]
    return dict(sorted(legacy.items()))


def verify_legacy(family: Family, folder: Path, arrays: Arrays) -> None:
    """Check that the old-style config means the same, and that its scaling matters."""
    config = AutoConfig.from_pretrained(folder / "config_legacy.json")
    same = forward(build(family, config), arrays["tokens"]).numpy()
    require(np.array_equal(same, arrays["logits"]), f"{folder}: legacy config differs")
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": family.config.rope_parameters["rope_theta"],
    }
    unscaled = forward(build(family, config), arrays["tokens"]).numpy()
    change = np.abs(unscaled - arrays["logits"]).max()
    require(change > 0.5, f"{folder}: rope scaling moves the logits by {change} only")


def write_tiny(family: Family, folder: Path) -> None:
    """Write one tiny family's config, weights and outputs to its folder.

    Raises:
        RuntimeError: the model is unfit to record, or is stored in a wrong way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    model = build(family)
    arrays = tiny_arrays(family, model)
    model.save_pretrained(folder, max_shard_size=family.max_shard)
    (folder / "generation_config.json").unlink()
    shards = len(list(folder.glob("*.safetensors")))
    require(shards == family.shards, f"{folder}: {shards} weight files")
    if family.legacy:
        config = legacy_config(json.loads((folder / "config.json").read_text()))
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config_legacy.json").write_text(text)
        verify_legacy(family, folder, arrays)
    np.savez_compressed(folder / "expected.npz", **arrays)


def read_tiny(family: Family, folder: Path) -> tuple[Arrays, list[str]]:
    """Outputs of a stored tiny model, and what is wrong with how it is stored.

    The weights are read back through `from_pretrained` (so a sharded index too) and
    have to be those that the family's seed gives, and the config the family's own.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    faults = []
    fresh = build(family)
    stored = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if name not in stored or not torch.equal(stored[name], parameter):
            faults.append(f"weights of {name} differ")
    fresh.config.architectures = [type(fresh).__name__]
    config = json.loads(fresh.config.to_json_string())
    written = json.loads((folder / "config.json").read_text())
    # The version alone may differ, when newer pins are being tried.
    if written | {"transformers_version": config["transformers_version"]} != config:
        faults.append("config.json differs")
    arrays = tiny_arrays(family, model)
    if family.legacy:
        verify_legacy(family, folder, arrays)
    return arrays, faults
