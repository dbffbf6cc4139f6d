"""Adapters with whole modules and biases, of PEFT and ours as PEFT reads them.

As `adapters.py`, to some of the same models: trained modules and biases are seeded,
too, so only their names are stored. PEFT's own losses of training them are recorded.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import switches
import torch
from adapters import CONFIG, TENSORS, filled, logits_of, require
from peft import LoraConfig, PeftModel, get_peft_model
from reference import Arrays
from safetensors.numpy import load_file, save_file
from seeded_factors import read_export
from seeded_weights import make_weights

FOLDER = "whole_modules"
USUAL: dict[str, Any] = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "target_modules": ["v_proj", "gate_proj"],
        "modules_to_save": ["lm_head", "input_layernorm", "q_proj"],
        "bias": "lora_only",
    },
    "qwen2_window": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["embed_tokens", "norm"],
        "ensure_weight_tying": True,
    },
    "gemma3": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "k_norm", "model.norm"],
        "ensure_weight_tying": True,
    },
    "gpt_neox": {
        "target_modules": ["dense_h_to_4h"],
        "modules_to_save": ["query_key_value", "final_layer_norm", "lm_head"],
        "bias": "all",
    },
    "gpt2": {"target_modules": ["c_attn"], "modules_to_save": ["wpe"], "bias": "all"},
    "mixtral": {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate", "norm"]},
}
# Training: batches, and the rate of plain AdamW.
STEPS, ROWS, RATE = 20, 2, 3e-3


def saved(model: Any) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, TENSORS))


def whole(model: Any, tiny: switches.Tiny) -> dict[str, list[int]]:
    """Gives what `model` saves whole seeded values; returns their names and shapes."""
    # A bias of a module that is saved whole is written under three names.
    shapes = {
        name: list(value.shape)
        for name, value in sorted(saved(model).items())
        if not any(x in name for x in ("lora_", ".original_", ".modules_to_save."))
    }
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in seeded(shapes, tiny).items():
            place, _, part = name.rpartition(".")
            inner = f"{place}.modules_to_save.default.{part}"
            # A tied head is the embeddings' own.
            if (key := inner if inner in named else name) in named:
                named[key].copy_(torch.from_numpy(value))
    return shapes


def seeded(shapes: dict[str, list[int]], tiny: switches.Tiny) -> Arrays:
    return make_weights(shapes, tiny.seed + 1, tiny.norm_mean)


def by_peft(tiny: switches.Tiny) -> tuple[dict[str, Any], dict[str, Any], Arrays]:
    """The config and tensor shapes of an adapter that PEFT makes, and its results."""
    _, _, model = switches.written(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**USUAL, **CASES[tiny.name]))
        shapes = filled(adapted, tiny.seed) | whole(adapted, tiny)
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            config = json.loads(Path(folder, CONFIG).read_text())
        arrays = {"peft": logits_of(tiny, adapted.eval())["logits"]}
        arrays["losses"] = train(tiny, adapted)
    # A folder of this machine, and sets, which PEFT writes in any order.
    config["base_model_name_or_path"] = tiny.name
    for field, value in config.items():
        config[field] = sorted(value) if isinstance(value, list) else value
    return config, shapes, arrays


def train(tiny: switches.Tiny, model: Any) -> np.ndarray:
    """The losses of the next tokens in `STEPS` updates of everything that trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=RATE, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.0
    )
    losses = []
    for step in range(STEPS):
        ids = torch.from_numpy(batch(tiny, step)).long()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.float32(losses)


def batch(tiny: switches.Tiny, step: int) -> np.ndarray:
    random = np.random.RandomState([tiny.seed, step])
    return random.randint(0, switches.SHAPE["vocab_size"], (ROWS, switches.LENGTH))


def of_ours(tiny: switches.Tiny, root: Path) -> np.ndarray:
    """The logits that PEFT computes from the stored export.

    Raises:
        RuntimeError: PEFT finds a tensor missing, or continues other parameters.
    """
    _, _, model = switches.written(tiny)
    with tempfile.TemporaryDirectory() as folder:
        config, tensors = read_export(root / FOLDER / tiny.name)
        Path(folder, CONFIG).write_text(json.dumps(config))
        save_file(tensors, Path(folder, TENSORS), metadata={"format": "pt"})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    odd = [str(x.message) for x in said if "missing" in str(x.message)]
    require(not odd, f"{tiny.name}: {odd}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = saved(adapted)
    lost = [x for x in tensors if x not in again or np.any(again[x] != tensors[x])]
    require(not lost, f"{tiny.name}: PEFT does not save {lost[:3]} again")
    return logits_of(tiny, adapted.eval())["logits"]


def cases() -> list[switches.Tiny]:
    return [tiny for tiny in switches.TINY if tiny.name in CASES]


def write_whole(tiny: switches.Tiny, root: Path) -> None:
    folder = root / FOLDER / tiny.name
    config, shapes, arrays = by_peft(tiny)
    facts = {"config": config, "seed": tiny.seed, "norm_mean": tiny.norm_mean}
    (folder / "peft.json").write_text(json.dumps(facts | {"shapes": shapes}) + "\n")
    arrays["ours"] = of_ours(tiny, root)
    np.savez_compressed(folder / "expected.npz", **arrays)


def read_whole(tiny: switches.Tiny, root: Path) -> tuple[Arrays, list[str]]:
    """Results computed again, and what is wrong with the files of the folder."""
    config, shapes, arrays = by_peft(tiny)
    stored = json.loads((root / FOLDER / tiny.name / "peft.json").read_text())
    faults = []
    if stored["config"] | {"peft_version": config["peft_version"]} != config:
        faults.append("adapter_config.json differs")
    if stored["shapes"] != shapes:
        faults.append("tensor names differ")
    return arrays | {"ours": of_ours(tiny, root)}, faults
