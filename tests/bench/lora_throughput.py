"""LoRA throughput against TRL + PEFT, both sides in turn on the same machine.

    make bench FLAGS="--data=path/to/dolly.jsonl.gz"

Rounds of: this trainer, TRL padded, TRL packed, and both TRL sides once more with one
row a forward pass (gradient accumulation), which is not TRL's default but its fastest
here. Each side takes real Dolly rows, rank 16 on every linear layer, at most 512
tokens a row, optimizer batches of 8 rows, and the dtype that is faster for it
(`--dtypes` tries several). Prints real (non-padding) tokens per second, peak memory of
the process and the ratios, medians over the rounds.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARMUP_STEPS = 2


def run_ours(data: str, dtype: str, steps: int, microbatch: int) -> dict[str, Any]:
    """Trains through the real command and reads its `metrics.jsonl`."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "research.train",
            "--config=configs/finetune_dolly.py",
            f"--config.run_dir={run_dir}",
            f"--config.data.path={data}",
            f"--config.model.dtype={dtype}",
            f"--config.steps={steps + WARMUP_STEPS}",
            "--config.data.batch_size=8",
            f"--config.data.microbatch_size={microbatch}",
            "--config.data.seq_len=512",
            "--config.lora.rank=16",
            "--config.data.max_rows=2000",
            "--config.data.held_out=8",
            "--config.eval.every=1000",
            "--config.eval.prompts=1",
            "--config.eval.max_new_tokens=1",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    counted = [x for x in lines if x["kind"] == "train" and x["step"] > WARMUP_STEPS]
    seconds = sum(x["step_s"] for x in counted)
    return {
        "real_tokens_per_s": sum(x["tokens"] for x in counted) / seconds,
        "trained_tokens_per_s": sum(x["trained_tokens"] for x in counted) / seconds,
        "peak_rss_gb": counted[-1]["memory_gb"],
    }


def run_trl(
    python: str, data: str, dtype: str, steps: int, packing: bool, microbatch: int
) -> dict[str, Any]:
    """One run of `trl_side.py` under its own interpreter."""
    command = [
        python,
        str(ROOT / "tests/bench/trl_side.py"),
        f"--data={data}",
        "--rows=512",
        f"--dtype={dtype}",
        "--packing" if packing else "--no-packing",
        f"--micro-batch={microbatch}",
        f"--steps={steps + WARMUP_STEPS}",
    ]
    # Our Makefile's allocator settings are no part of TRL's set-up.
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="Dolly rows, .jsonl or .jsonl.gz")
    parser.add_argument("--torch-python", required=True, help="with TRL installed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="counted steps a run")
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated")
    parser.add_argument(
        "--defaults-only",
        action="store_true",
        help="leave out TRL with one row a pass, which is not its default",
    )
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve())
    python = str(Path(arguments.torch_python).absolute())
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    sides = {"ours": functools.partial(run_ours, data, microbatch=arguments.microbatch)}
    shapes = [(False, 8), (True, 8), (False, 1), (True, 1)]
    for packing, microbatch in shapes[: 2 if arguments.defaults_only else 4]:
        name = "TRL packed" if packing else "TRL padded"
        sides[name if microbatch == 8 else f"{name}, 1 row a pass"] = functools.partial(
            run_trl, python, data, packing=packing, microbatch=microbatch
        )
    for _ in range(arguments.rounds):
        for dtype in arguments.dtypes.split(","):
            for name, side in sides.items():
                found = side(dtype=dtype, steps=arguments.steps)
                results.setdefault((name, dtype), []).append(found)
                print(name, dtype, json.dumps(found), flush=True)
    show(results)


def show(results: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Medians by side in its better dtype, then the ratios."""

    def median(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    best: dict[str, tuple[float, float]] = {}
    for (name, dtype), runs in results.items():
        speed, memory = (median(runs, k) for k in ("real_tokens_per_s", "peak_rss_gb"))
        print(f"{name:24s} {dtype:10s} {speed:7.1f} real tokens/s  {memory:5.2f} GB")
        if speed > best.get(name, (0.0, 0.0))[0]:
            best[name] = (speed, memory)
    ours = best.pop("ours")
    for name, theirs in best.items():
        print(
            f"ours / {name}: {ours[0] / theirs[0]:.2f} times the real tokens/s, "
            f"{ours[1] / theirs[1]:.2f} of the memory"
        )


if __name__ == "__main__":
    main()
