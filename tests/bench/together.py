"""Eight LoRA runs of SmolLM2 as one program, against the same runs one by one.

    python tests/bench/together.py --steps=20 --dtype=float32

Whole processes on both sides: start-up, compilation, evaluation, checkpoints and
reports are counted. Prints wall time, CPU seconds and peak memory of both, their
ratios, how much of the time the steps took, what the ratio would be at other numbers of
steps and no more saves or evaluations, and the largest relative difference between two
runs' losses (in bfloat16 they round apart). On a busy machine the ratio of CPU seconds
says more than that of wall time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RUNS = [(rank, seed) for seed in (0, 1) for rank in (4, 8, 16, 32)]


class Use(NamedTuple):
    """The seconds of one command, and its peak memory in GB."""

    wall: float
    cpu: float
    memory: float


def run(module: str, *flags: str) -> Use:
    begun = time.perf_counter()
    command = [sys.executable, "-m", f"research.{module}", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return Use(time.perf_counter() - begun, cpu, usage.ru_maxrss / 1e6)


def lines(folder: Path, kind: str) -> list[dict]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder, "train")]


def step_seconds(folder: Path) -> float:
    """Seconds of the whole process; every run of the pack records the same."""
    return lines(folder, "goodput")[-1]["seconds/step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--at-once", type=int, default=0, help="as train.together")
    options = parser.parse_args()
    shared = [
        "--config=configs/finetune_dolly.py",
        f"--config.steps={options.steps}",
        f"--config.data.seq_len={options.seq_len}",
        f"--config.data.batch_size={options.batch}",
        f"--config.data.microbatch_size={options.batch}",
        f"--config.model.dtype={options.dtype}",
        "--config.data.held_out=16",
        "--config.eval.prompts=1",
        "--config.eval.answers_rows=0",
        "--config.eval.max_new_tokens=16",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Neither side may find the other's programs in the cache.
        caches = [
            f"--config.runtime.compilation_cache={folder / side}-cache"
            for side in ("alone", "together")
        ]
        alone = [
            run(
                "train", *shared, caches[0],
                f"--config.lora.rank={rank}", f"--config.seed={seed}",
                f"--config.run_dir={folder}/alone-{rank}-{seed}",
            )
            for rank, seed in RUNS
        ]  # fmt: skip
        print("alone, s:", " ".join(f"{x.wall:.0f}" for x in alone), flush=True)
        runs = [
            {"run_dir": f"{folder}/together-{r}-{s}", "lora.rank": r, "seed": s}
            for r, s in RUNS
        ]
        (folder / "runs.json").write_text(json.dumps(runs))
        file = f"--runs={folder / 'runs.json'}"
        at_once = f"--at_once={options.at_once}"
        together = run("train.together", *shared, caches[1], file, at_once)
        apart = max(
            abs(a - b) / a
            for rank, seed in RUNS
            for a, b in zip(
                losses(folder / f"alone-{rank}-{seed}"),
                losses(folder / f"together-{rank}-{seed}"),
                strict=True,
            )
        )
        steps = (
            sum(step_seconds(folder / f"alone-{r}-{s}") for r, s in RUNS),
            step_seconds(folder / "together-{}-{}".format(*RUNS[0])),
        )
    total, cpu = sum(x.wall for x in alone), sum(x.cpu for x in alone)
    seconds, largest = together.wall, max(x.memory for x in alone)
    print(
        f"{len(RUNS)} runs of {options.steps} steps: one by one {total:.0f} s and "
        f"{largest:.2f} GB, together {seconds:.0f} s and {together.memory:.2f} GB: "
        f"{seconds / total:.2f} of the time, {together.memory / largest:.2f} of one "
        f"run's memory, {together.memory / sum(x.memory for x in alone):.2f} of all "
        f"runs' at once; losses within {apart:.1e}"
    )
    print(
        f"CPU seconds: one by one {cpu:.0f}, together {together.cpu:.0f}: "
        f"{together.cpu / cpu:.2f}"
    )
    print(f"of which steps: one by one {steps[0]:.0f} s, together {steps[1]:.0f} s")
    for number in (5, 10, 20, 50, 200):
        more = number / options.steps - 1
        ratio = (seconds + more * steps[1]) / (total + more * steps[0])
        print(f"at {number} steps, reckoned from these: {ratio:.2f} of the time")


if __name__ == "__main__":
    main()
