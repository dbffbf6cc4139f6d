"""LoRA of an 8B Llama on one accelerator, against PEFT on the same card.

    python tests/bench/accelerator_lora.py --torch-python=.venv-torch/bin/python

Rank 16 on every linear layer but the head, random weights in bfloat16, the same random
rows on both sides, every row one document. First each side looks for its best: ours
over what is recomputed and the rows of a pass, PEFT (transformers' Llama, SDPA) over
gradient checkpointing and the rows of a pass, then also with bfloat16 adapters. Then
the best of both run in turn, and the medians of the rounds are compared. Every trial is
a process of its own. The goal is 1.5 times the tokens a second.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trials
from trials import Trial

from research.config import command_line
from research.core.errors import UserError
from research.models.families.family_registry import to_hf_config
from research.models.presets import preset

GOAL = 1.5
SHAPE = "llama3.1-8b"
RANK = 16
PLAIN, RECOMPUTED, HALF = "plain", "checkpointing", "bfloat16 adapters"

Run = Callable[[str, int], Trial]


def our_side(arguments: argparse.Namespace) -> Run:
    """Runs `random_step.py` with a remat policy and rows a pass."""

    def run(way: str, micro: int) -> Trial:
        knobs = f"model.remat={way}", f"lora.rank={RANK}"
        command = trials.our_step(arguments, micro, *knobs)
        return trials.run_trial(
            way, micro, command, ours=True, timeout=arguments.timeout
        )

    return run


def other_side(arguments: argparse.Namespace, folder: Path, device: str) -> Run:
    """Runs `peft_side.py` with words of its way and rows a pass."""
    shape = folder / "config.json"
    shape.write_text(json.dumps(to_hf_config(preset(arguments.preset))))

    def run(way: str, micro: int) -> Trial:
        words = way.split(", ")
        command = [
            # No `resolve`: the link in a virtual environment is what finds packages.
            str(Path(arguments.torch_python).absolute()),
            str(trials.BENCH / "peft_side.py"),
            f"--shape={shape}",
            f"--rows={arguments.rows}",
            f"--micro={micro}",
            f"--seq={arguments.seq}",
            f"--trained={arguments.trained}",
            f"--rank={RANK}",
            f"--adapters={'bfloat16' if HALF in words else 'float32'}",
            "--recompute" if RECOMPUTED in words else "--no-recompute",
            f"--device={device}",
            f"--steps={arguments.steps}",
        ]
        return trials.run_trial(
            way, micro, command, ours=False, timeout=arguments.timeout
        )

    return run


def shown(side: str, run: Run) -> Run:
    """`run`, and a row of the table."""

    def call(way: str, micro: int) -> Trial:
        trial = run(way, micro)
        cells = [trial.failure, "", "", ""]
        if found := trial.found:
            numbers = found["tokens_per_s"], found["step_s"], found["memory_gb"]
            forms = "{:,.0f}", "{:.3f}", "{:.1f}"
            cells = [form.format(x) for form, x in zip(forms, numbers, strict=True)]
            cells.append(found["device"])
        trials.row(side, way, str(micro), *cells)
        return trial

    return call


def check_same(ours: Trial, theirs: Trial) -> None:
    """A ratio of different work would mean nothing.

    Raises:
      UserError: the sides trained other parameters or positions.
    """
    for name in ("trained", "positions"):
        mine, other = ((trial.found or {})[name] for trial in (ours, theirs))
        if mine != other:
            raise UserError(f"the sides differ in {name}: ours {mine}, PEFT {other}")


def compare(sides: dict[str, tuple[Run, Trial]], rounds: int) -> None:
    """Runs each side's best in turn and prints medians and their ratio."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (run, fastest) in sides.items():
            trial = run(fastest.way, fastest.micro)
            if trial.found is None:
                raise UserError(f"{name} failed in a later round: {trial.failure}")
            speeds[name].append(trial.speed)
    print()
    for name, (_, fastest) in sides.items():
        print(
            f"{name}: {statistics.median(speeds[name]):,.0f} tokens/s with "
            f"{fastest.way}, {fastest.micro} rows a pass (median of {rounds} in turn: "
            f"{', '.join(f'{speed:,.0f}' for speed in speeds[name])})"
        )
    ours, theirs = (statistics.median(speed) for speed in speeds.values())
    versions = (sides["PEFT"][1].found or {})["versions"]
    against = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"ours / PEFT: {ours / theirs:.2f} (goal {GOAL}); {against}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trials.add_common(parser, config="configs/finetune_8b.py", rows=16)
    parser.add_argument("--torch-python", required=True, help="with PEFT installed")
    parser.add_argument("--rounds", type=int, default=3, help="of each side's best")
    arguments = parser.parse_args(argv[1:])
    sizes = trials.sizes(arguments)
    if not Path(arguments.torch_python).is_file():
        raise UserError(f"--torch-python={arguments.torch_python} is not a file")
    device = trials.find_device(arguments.preset)
    if device.platform not in ("cpu", "gpu", "cuda"):
        raise UserError(f"PEFT needs a GPU to compare with, JAX finds {device.kind}")
    arguments.preset = arguments.preset or SHAPE
    where = "cpu" if device.platform == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        ours = shown("ours", our_side(arguments))
        theirs = shown("PEFT", other_side(arguments, Path(folder), where))
        names = "side", "way", "rows a pass", "tokens/s", "s a step", "GB", "device"
        trials.head(device, *names)
        ways = arguments.remat.split(",")
        mine = trials.best(list(trials.sweep(ours, ways, sizes)), "ours")
        tried = list(trials.sweep(theirs, (PLAIN, RECOMPUTED), sizes))
        fastest = trials.best(tried, "PEFT")
        tried.append(theirs(f"{fastest.way}, {HALF}", fastest.micro))
        fastest = trials.best(tried, "PEFT")
        check_same(mine, fastest)
        compare({"ours": (ours, mine), "PEFT": (theirs, fastest)}, arguments.rounds)


if __name__ == "__main__":
    command_line.run(main)
