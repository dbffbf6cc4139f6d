"""Transformers and PEFT read the folders that we export, and compute what we do.

    python tests/golden/our_exports.py --torch-python=.venv-torch/bin/python

Every model of `switches/` gets random adapters on all matrices. Ours computes logits
with the adapters beside the weights, and the export `hf` is read by transformers.
Adapters of the kinds in `KINDS` start as in a run, and are then moved. Their export
`peft` is read by PEFT over the original base, and merged by it, too. Both are read in
the environment of torch, which calls this script again with `--read`.
"""

import argparse
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
LOGITS, ADAPTER = "logits.npz", "adapter_config.json"
RANK = 2
# The rank of an export, against that of training: the part of the weight that was the
# start is taken out by as many factors again.
KINDS = {"pissa": 2, "olora": 2, "orthogonal": 1, "vera": 1, "dora": 1}
# Separate modules, fused ones, those of experts, and matrices that lie transposed.
ADAPTED = ("qwen2", "phi3", "mixtral", "gpt2")
# PEFT has no DoRA of experts.
WITHOUT = {("dora", "mixtral")}


def write(folder: Path) -> None:
    """Exports every model below `folder`, with the logits that it should give."""
    sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1])]
    from switch_models import NAMES, SwitchModel

    for name in NAMES:
        tiny = SwitchModel(name, folder / f"base-{name}")
        write_merged(tiny, folder / name)
        for kind in KINDS if name in ADAPTED else ():
            if (kind, name) not in WITHOUT:
                write_adapter(tiny, kind, folder / f"{name}.{kind}")


def write_merged(tiny: Any, folder: Path) -> None:
    from exported_models import with_adapters

    from research.config.knob_groups import LoRAConfig
    from research.formats.export_format import ExportOptions
    from research.formats.huggingface.huggingface_export import FORMAT

    exported = with_adapters(tiny.model, tiny.params, LoRAConfig(rank=RANK))
    folder.mkdir()
    FORMAT.write(exported, folder, ExportOptions())
    write_logits(tiny, exported.weights, folder)


def write_adapter(tiny: Any, kind: str, folder: Path) -> None:
    """Exports adapters that began as a run does, and have moved since."""
    import jax
    from exported_models import FACTS, tiny_tokenizer
    from helpers import random_adapters

    from research.config.run_config import Config, LoRAConfig, ModelConfig
    from research.formats.export_format import ExportOptions
    from research.formats.peft.peft_format import FORMAT
    from research.runs.lineage.exported_model import with_facts
    from research.weights import trainable

    targets = ("attention", r"mlp\.(gate|up|down)")
    lora = LoRAConfig(kind=kind, rank=RANK, alpha=3.0, targets=targets)
    config = Config(lora=lora, model=ModelConfig(dtype="float32"))
    split = trainable.make("lora", config.model, config.lora, tiny.model.specs)
    start = split.init(jax.random.key(0), tiny.params)
    moves = random_adapters(split.specs)
    trained = {
        path: {k: x if split.specs[path][k].fixed else x + moves[path][k]
               for k, x in own.items()}
        for path, own in start.items()
    }  # fmt: skip
    opened = types.SimpleNamespace(
        config=config, base=None, model=tiny.model, trainable=split, params=trained,
        frozen=tiny.params,
    )  # fmt: skip
    exported = with_facts(FACTS, tiny_tokenizer(), opened)
    folder.mkdir()
    FORMAT.write(exported, folder, ExportOptions())
    write_logits(tiny, exported.weights, folder)


def write_logits(tiny: Any, weights: Any, folder: Path) -> None:
    from switch_models import make_logits

    tokens = tiny.expected["tokens"]
    places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    rows = tokens.astype(np.int32), places, np.ones_like(places)
    logits, base = (
        np.array(make_logits(tiny.model)(x, *rows)) for x in (weights, tiny.params)
    )
    np.savez(folder / LOGITS, tokens=tokens, logits=logits, base=base)


def read(folder: Path) -> bool:
    """Prints how far each export is from what we compute; whether all agree."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    agreed = True
    for file in sorted(folder.glob(f"*/{LOGITS}")):
        recorded = np.load(file)
        has_adapter = (file.parent / ADAPTER).is_file()
        reader = read_adapter if has_adapter else read_merged
        found, faults = reader(file.parent, recorded["tokens"])
        if not np.abs(recorded["logits"] - recorded["base"]).max() > 0.1:
            faults.append("the adapters change too little to show anything")
        differences = [float(np.abs(x - recorded["logits"]).max()) for x in found]
        if not max(differences) <= TOLERANCE:
            faults.append("DIFFERS")
        agreed &= not faults
        said = ", ".join(f"{x:.2e}" for x in differences)
        how = "adapter and its merge" if has_adapter else "export"
        print(
            f"{how} of {file.parent.name}: max abs difference {said}, "
            f"{'; '.join(faults) or 'ok'}",
            flush=True,
        )
    return agreed


def read_merged(folder: Path, tokens: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """The logits of transformers, and what is wrong with the folder."""
    model, found = open_model(folder)
    return [logits_of(model, tokens)], [f"{k}: {x}" for k, x in found.items() if x]


def read_adapter(
    folder: Path, tokens: np.ndarray
) -> tuple[list[np.ndarray], list[str]]:
    """The logits of PEFT over the original base, those after its merge, and faults."""
    from peft import PeftModel

    name, _, kind = folder.name.partition(".")
    model, _ = open_model(folder.with_name(f"base-{name}"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    faults = [str(x.message) for x in said if "missing" in str(x.message)]
    config = adapted.peft_config["default"]
    # A fused module has the sum of the ranks of its parts.
    if config.r % (RANK * KINDS[kind]) or config.init_lora_weights is not True:
        faults.append(f"r={config.r}, init_lora_weights={config.init_lora_weights}")
    found = [logits_of(adapted, tokens)]
    return [*found, logits_of(adapted.merge_and_unload(), tokens)], faults


def open_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    return model.eval(), found


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def main() -> int:
    """Command line entry point; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", type=Path)
    parser.add_argument("--read", type=Path)
    options = parser.parse_args()
    if options.read:
        return 0 if read(options.read) else 1
    with tempfile.TemporaryDirectory(prefix="exports-") as folder:
        write(Path(folder))
        words = [options.torch_python, __file__, f"--read={folder}"]
        return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
