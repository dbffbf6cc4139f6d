"""Adapters to the models of `switches.py`: those of PEFT, and ours as PEFT reads them.

An adapter of PEFT has seeded factors, so only its config and the names of its tensors
are stored. Ours is stored as `research.formats.peft` has written it; see
`support/peft_exports.py`. The logits that PEFT computes are stored for both.
"""

import dataclasses
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import switches
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import Arrays, forward, require
from safetensors.numpy import load_file, save_file
from seeded_factors import make_factors, read_export

FOLDER = "adapters"
FIELDS = "lora_fields.json"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Every config has ranks and alphas of its own for some layers, of which the first
# pattern counts. PEFT sorts them when it saves.
USUAL: dict[str, Any] = {
    "target_modules": "all-linear",
    "r": 3,
    "lora_alpha": 5,
    "rank_pattern": {r"1\.[a-z_.]*(q_proj|dense|c_fc)": 4, r"[1]\..*": 2},
    "alpha_pattern": {r"2\..*": 7},
}
TIED = {"ensure_weight_tying": True}
WITH_EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {"1.mlp.experts.down_proj": 2},
}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_rslora": True},
    "qwen2_window": {"target_modules": ["q_proj", "down_proj", "embed_tokens"], **TIED},
    "qwen3": {"target_modules": ["k_proj", "embed_tokens", "lm_head"]},
    "olmo2": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "granite": {"target_modules": r".*\.(v_proj|gate_proj)", "use_rslora": True},
    "phi3": {"use_rslora": True},
    "gemma3": {"target_modules": ["o_proj", "lm_head"], **TIED},
    **dict.fromkeys(WITH_EXPERTS, EXPERTS),
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj", "lm_head", "wpe"], **TIED},
}


def filled(model: Any, seed: int) -> dict[str, list[int]]:
    """Gives the factors of `model` seeded values; returns their names and shapes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shapes = {k: list(x.shape) for k, x in load_file(Path(folder, TENSORS)).items()}
    shapes = {name: shapes[name] for name in sorted(shapes) if "lora_" in name}
    values = make_factors(shapes, seed)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            start, mark, end = name.partition(".lora_")
            kind, _, rest = end.partition(".")
            key = f"{start}{mark}{kind}.default{'.' + rest if rest else ''}"
            # A tied head is the embeddings' own, which come later.
            named[key].copy_(torch.from_numpy(value))
    return shapes


def by_peft(tiny: switches.Tiny) -> tuple[dict[str, Any], dict[str, Any], Arrays]:
    """The config and tensor shapes of an adapter that PEFT makes, and its logits."""
    _, _, model = switches.written(tiny)
    fields = USUAL | CHANGES.get(tiny.name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
        shapes = filled(adapted, tiny.seed)
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            config = json.loads(Path(folder, CONFIG).read_text())
    # A folder of this machine, and sets, which PEFT writes in any order.
    config["base_model_name_or_path"] = tiny.name
    for field, value in config.items():
        config[field] = sorted(value) if isinstance(value, list) else value
    return config, shapes, logits_of(tiny, adapted.eval())


def of_ours(tiny: switches.Tiny, root: Path) -> Arrays:
    """The logits that PEFT computes from the stored export.

    Raises:
        RuntimeError: PEFT finds a tensor missing, or merging changes the logits.
    """
    stored = root / FOLDER / tiny.name
    _, _, model = switches.written(tiny)
    with tempfile.TemporaryDirectory() as folder:
        config, tensors = read_export(stored)
        Path(folder, CONFIG).write_text(json.dumps(config))
        save_file(tensors, Path(folder, TENSORS), metadata={"format": "pt"})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder).eval()
    odd = [str(x.message) for x in said if "missing" in str(x.message)]
    require(not odd, f"{tiny.name}: {odd}")
    found = logits_of(tiny, adapted)
    if model.config.get_text_config().tie_word_embeddings:
        return found  # PEFT adds the update of a table to it at both ends.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = logits_of(tiny, adapted.merge_and_unload())
    difference = float(np.abs(found["logits"] - merged["logits"]).max())
    require(difference < 1e-3, f"{tiny.name}: merging changes {difference:.1e}")
    return found


def lora_fields() -> dict[str, Any]:
    """The fields of PEFT's LoraConfig with their defaults, as in a config file."""
    defaults = LoraConfig().to_dict() | {"runtime_config": None}
    assert defaults.keys() == {field.name for field in dataclasses.fields(LoraConfig)}
    # The version is that of the library that writes the file.
    return json.loads(json.dumps(defaults | {"peft_version": None}))


def logits_of(tiny: switches.Tiny, model: Any) -> Arrays:
    vocab = switches.config_of(tiny).get_text_config().vocab_size
    tokens = np.random.RandomState(tiny.seed).randint(0, vocab, (2, switches.LENGTH))
    logits = forward(model, tokens).numpy()
    return {"logits": logits[:, switches.EVERY - 1 :: switches.EVERY]}


def write_adapter(tiny: switches.Tiny, root: Path) -> None:
    folder = root / FOLDER / tiny.name
    config, shapes, arrays = by_peft(tiny)
    (folder / "peft.json").write_text(
        json.dumps({"config": config, "seed": tiny.seed, "shapes": shapes}) + "\n"
    )
    arrays = {"peft": arrays["logits"], "ours": of_ours(tiny, root)["logits"]}
    np.savez_compressed(folder / "expected.npz", **arrays)


def read_adapter(tiny: switches.Tiny, root: Path) -> tuple[Arrays, list[str]]:
    """Logits computed again, and what is wrong with the files of the folder."""
    config, shapes, arrays = by_peft(tiny)
    stored = json.loads((root / FOLDER / tiny.name / "peft.json").read_text())
    faults = []
    if stored["config"] | {"peft_version": config["peft_version"]} != config:
        faults.append("adapter_config.json differs")
    if stored["shapes"] != shapes:
        faults.append("tensor names differ")
    return {"peft": arrays["logits"], "ours": of_ours(tiny, root)["logits"]}, faults
