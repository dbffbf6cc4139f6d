"""A step of DoRA against one of LoRA, here and in PEFT.

    python tests/bench/dora_step.py --data=dolly-15k.jsonl.gz \
        --torch-python=.venv-torch/bin/python

Ours: the real model, real rows and the real step, both kinds in turn in one process
(`step_sides.py`). PEFT: the same shape and as many rows and tokens, drawn at random,
without padding; each kind in a process of its own (`peft_side.py` on the CPU), in turn.
Both sides have adapters of rank 16 on all linear layers, as many rows in a pass, and
the allocator settings of this process. Prints the seconds of a step and both ratios:
a ratio compares two steps of one side, so it does not tell which side is faster.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from random_step import ROOT
from step_sides import add_flags, read_sides, speed, train_in_turn

from research.config import command_line
from research.config.run_config import Config
from research.models.families.family_registry import to_hf_config
from research.models.presets import preset

KINDS = ("lora", "dora")


def peft_seconds(
    python: str, config: Config, shape: str, kind: str, steps: int
) -> list[float]:
    """Seconds of `steps` steps of PEFT with adapters of `kind`."""
    data = config.data
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(to_hf_config(preset(shape))))
        command = [
            python,
            str(ROOT / "tests/bench/peft_side.py"),
            f"--shape={file}",
            f"--rows={data.batch_size}",
            f"--micro={data.rows_per_pass}",
            f"--seq={data.seq_len}",
            f"--rank={config.lora.rank}",
            f"--steps={steps}",
            "--warmup=1",
            "--device=cpu",
            "--dora" if kind == "dora" else "--no-dora",
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    add = parser.add_argument
    add("--torch-python", default="", help="with PEFT; without it our side alone runs")
    add("--shape", default="smollm2-135m", help="preset of PEFT's model")
    add("--peft-steps", type=int, default=3, help="of each process, without the first")
    add("--rounds", type=int, default=2, help="processes of PEFT for each kind")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv[1:])
    configs = read_sides(arguments, {kind: {"lora.kind": kind} for kind in KINDS})
    theirs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds if arguments.torch_python else 0):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            theirs[kind] += peft_seconds(
                arguments.torch_python, configs[kind], arguments.shape, kind,
                arguments.peft_steps,
            )  # fmt: skip
    sides, _ = train_in_turn(configs, measures=False)
    ours = {side.name: side.seconds[arguments.warmup :] for side in sides}
    for name, seconds in (("ours", ours), ("PEFT", theirs)):
        for kind in KINDS if seconds["lora"] else ():
            print(f"{name} {kind}: {speed(seconds['lora'], seconds[kind])}")
    ratios = [
        f"{name} {statistics.median(x['lora']) / statistics.median(x['dora']):.2f}"
        for name, x in (("ours", ours), ("PEFT", theirs))
        if x["lora"]
    ]
    print(f"speed of a DoRA step against a LoRA step: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
