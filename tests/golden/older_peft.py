"""An older PEFT reads the adapter folders that we export as the newest reads them.

    PYTHONPATH=.venv-torch/older-peft .venv-torch/bin/python tests/golden/older_peft.py

The folders, and the logits that the newest PEFT computes with them, lie in `adapters/`;
`make.py --check` computes these again. Models with experts are not read: transformers 5
stores all experts of a layer as one parameter, which PEFT adapts from 0.21 on.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

import adapters
import numpy as np
import peft
import switches
import torch
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5


def main() -> int:
    """Prints how far this PEFT is from the newest; 1 if any adapter differs."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    agreed = True
    for tiny in switches.TINY:
        file = HERE / adapters.FOLDER / tiny.name / "expected.npz"
        if not file.is_file() or tiny.name in adapters.WITH_EXPERTS:
            continue
        found = adapters.of_ours(tiny, HERE)["logits"]
        difference = float(np.abs(found - np.load(file)["ours"]).max())
        agrees = difference <= TOLERANCE
        agreed &= agrees
        said = f"PEFT {peft.__version__}, adapter to {tiny.name}: max abs difference"
        print(f"{said} {difference:.1e}{'' if agrees else ' WRONG'}")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
