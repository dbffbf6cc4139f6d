"""Transformers reads the folders that we export, with adapters added in.

    python tests/golden/merged_exports.py --torch-python=.venv-torch/bin/python

Every model of `switches/` gets random adapters on all matrices. Ours computes logits
with the adapters beside the weights, and the export `hf` is read by transformers, in
the environment of torch, which calls this script again with `--read`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
LOGITS = "logits.npz"


def write(folder: Path) -> None:
    """Exports every model below `folder`, with the logits that it should give."""
    sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1])]
    import jax
    from exported_models import with_adapters
    from switch_models import NAMES, SwitchModel

    from research.config.knob_groups import LoRAConfig
    from research.formats.export_format import ExportOptions
    from research.formats.huggingface.huggingface_export import FORMAT

    for name in NAMES:
        tiny = SwitchModel(name, folder / f"base-{name}")
        exported = with_adapters(tiny.model, tiny.params, LoRAConfig(rank=2))
        (folder / name).mkdir()
        FORMAT.write(exported, folder / name, ExportOptions())
        tokens, model = tiny.expected["tokens"], tiny.model
        places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        logits = jax.jit(
            lambda params, *rows, model=model: model.logits(
                params, model.hidden(params, *rows)
            )
        )(exported.weights, tokens, places, np.ones_like(places))
        np.savez(folder / name / LOGITS, tokens=tokens, logits=np.array(logits))


def read(folder: Path) -> bool:
    """Prints how far transformers is from each export; whether all agree."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    agreed = True
    for file in sorted(folder.glob(f"*/{LOGITS}")):
        recorded = np.load(file)
        model, found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        faults = [f"{key}: {value}" for key, value in found.items() if value]
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(recorded["tokens"]).long()).logits
        difference = float(np.abs(logits.numpy() - recorded["logits"]).max())
        if not difference <= TOLERANCE:
            faults.append("DIFFERS")
        agreed &= not faults
        said = "; ".join(faults) or "ok"
        name = file.parent.name
        print(f"export of {name}: max abs difference {difference:.2e}, {said}")
    return agreed


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
