"""Our adapters to the models of `golden/switches`, and their export for PEFT."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file
from seeded_factors import make_factors, save_export
from seeded_weights import make_weights
from switch_models import SwitchModel

from research.config.knob_groups import LoRAConfig, ModelConfig
from research.formats.peft.lora_modules import lora_modules
from research.formats.peft.peft_export import plan_adapter
from research.formats.peft.whole_parameters import plan_whole
from research.models.families.family_registry import from_hf_config
from research.models.transformer import Model
from research.tasks import task_registry
from research.tokenize.tokenizer_training import save_tokenizer
from research.weights import trainable
from research.weights.adapters.lora import KIND

SWITCHES = Path(__file__).parents[1] / "golden" / "switches"
ADAPTERS, WHOLE_MODULES = (SWITCHES.parent / x for x in ("adapters", "whole_modules"))
# Every matrix has an adapter; some have a rank or a scale of their own.
LORA = LoRAConfig(
    targets=(".",),
    rank=2,
    alpha=4.0,
    rank_pattern=("key=1", "down=3"),
    alpha_pattern=("key=1", "value=8", "down=6"),
)

# The targets and whole parameters of our exports in `golden/whole_modules`: modules
# that fuse parameters, biases of modules with and without adapters, tied embeddings.
WHOLE = {
    "qwen2": (("mlp",), ("norms", "embeddings", "head", "biases", "query")),
    "qwen2_window": (("attention",), ("norms", "embeddings", "biases")),
    "gemma3": (("mlp",), ("norms", "embeddings")),
    "gpt_neox": (("mlp",), ("norms", "head", "biases", "query", "key", "value")),
    "gpt2": (("mlp",), ("norms", "embeddings", "biases")),
    "mixtral": (("attention",), ("norms", "embeddings")),
}


def adapters_of(model):
    """Seeded factors of every matrix that PEFT has a module for, and their scales."""
    known = {x for module in lora_modules(model.architecture, model.specs)
             for x in module.stored.paths}  # fmt: skip
    every = KIND.specs(model.specs, LORA)
    scales = KIND.settings({p: KIND.rank(x) for p, x in every.items()}, LORA).scales
    specs = {path: every[path] for path in every if path in known}
    shapes = {f"{p}.{k}": s.shape for p, x in specs.items() for k, s in x.items()}
    values = make_factors(shapes, 7)
    factors = {p: {k: values[f"{p}.{k}"] for k in x} for p, x in specs.items()}
    return factors, {path: scales[path] for path in specs}


def model_of(name):
    config = json.loads((SWITCHES / name / "config.json").read_text())
    return Model(from_hf_config(config))


def export_of(model, factors, scales):
    """The tensors and the config that the format `peft` writes."""

    def fetch(path, index):
        return tuple(np.asarray(factors[path][name][index]) for name in "ab")

    plan = plan_adapter(model.architecture, model.specs, scales, fetch)
    tensors = dict(plan.tensors())
    assert {name: value.shape for name, value in tensors.items()} == plan.shapes
    return tensors, plan.config


def whole_of(it):
    """Seeded factors, scales and whole parameters of a model of `WHOLE`."""
    targets, full = WHOLE[it.name]
    lora = dataclasses.replace(
        LORA, targets=targets, full=full, rank_pattern=(), alpha_pattern=()
    )
    split = trainable.make("lora", ModelConfig(), lora, it.model.specs)
    adapters = split.adapters(split.specs)
    shapes = {f"{p}.{k}": s.shape for p, x in adapters.items() for k, s in x.items()}
    values = make_factors(shapes, 7)
    factors = {p: {k: values[f"{p}.{k}"] for k in x} for p, x in adapters.items()}
    whole = {path: split.specs[path].shape for path in sorted(split.full)}
    mean = 0.5 if it.name == "gemma3" else 1.0  # Such scales are added to one.
    return factors, dict.fromkeys(factors, 2.0), make_weights(whole, 7, mean)


def whole_export_of(it, factors, scales, whole):
    """As `export_of`, with the parameters `whole` beside the adapters."""
    model = it.model
    tensors, config = export_of(model, factors, scales)

    def fetch(path, index):
        return np.asarray(whole.get(path, it.params[path])[index])

    names = config["target_modules"]
    shape = model.architecture, model.specs
    plan = plan_whole(*shape, frozenset(whole), names, fetch)
    found = dict(plan.tensors())
    assert {name: value.shape for name, value in found.items()} == plan.shapes
    return tensors | found, config | plan.fields


def write_adapter(folder, tensors, config):
    """An adapter folder as PEFT writes one; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    return str(folder)


def write_run(run, folder):
    """The adapters of a reopened run as its export in the format `peft` holds them."""
    factors = jax.tree.map(np.asarray, dict(run.params))
    scales = {path: float(run.weights[path].scale[0]) for path in factors}
    tensors, config = export_of(run.model, factors, scales)
    base = {"base_model_name_or_path": run.config.model.init_from}
    write_adapter(folder, tensors, config | base)
    tokenizer = task_registry.exported_tokenizer(run.config, run.base, run.system)
    save_tokenizer(tokenizer, folder)
    return folder


def write_exports():
    """Writes the exports that `golden/adapters.py` and `whole_modules.py` read."""
    for folder in sorted(SWITCHES.iterdir()):
        model = model_of(folder.name)
        tensors, config = export_of(model, *adapters_of(model))
        save_export(ADAPTERS / folder.name, config, tensors)
    with tempfile.TemporaryDirectory() as place:
        for name in WHOLE:
            it = SwitchModel(name, Path(place, name))
            tensors, config = whole_export_of(it, *whole_of(it))
            save_export(WHOLE_MODULES / name, config, tensors)


if __name__ == "__main__":
    write_exports()
