"""LoRA throughput against TRL + PEFT, both sides in turn on the same machine.

    make bench                                        # on the embedded sample rows
    make bench FLAGS="--data=path/to/dolly.jsonl.gz"  # on real Dolly rows

Each round runs this trainer, TRL padded and TRL packed. `--one-row` adds both TRL
sides with one row per forward pass (gradient accumulation), which is not TRL's default
but its fastest setting here. Every side trains on the same rows with rank 16 on every
linear layer, at most 512 tokens per row, and optimizer batches of 8 rows, in the dtype
that is faster for it (`--dtypes` tries several).

Every side runs under every allocator setting of `ALLOCATORS`, so each ratio compares
two processes with the same setting. The script prints real (non-padding) tokens per
second, the peak memory of the process, and the ratios; figures are medians over rounds.
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
# Runs by allocator, side and dtype.
Results = dict[tuple[str, str, str], list[dict[str, Any]]]
# The second is what the Makefile sets for us: freed memory is kept, on huge pages.
ALLOCATORS = {
    "plain malloc": "",
    "huge pages": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"
    ":glibc.malloc.trim_threshold=100000000000",
}


def environment(tunables: str) -> dict[str, str]:
    """This process's variables with the allocator setting that both sides share."""
    others = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return others | ({"GLIBC_TUNABLES": tunables} if tunables else {})


def run_ours(
    data: str, dtype: str, steps: int, tunables: str, microbatch: int
) -> dict[str, Any]:
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
            "--config.eval.answers_rows=0",
            "--config.eval.max_new_tokens=1",
        ]
        env = environment(tunables)
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env=env)
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
    python: str,
    data: str,
    dtype: str,
    steps: int,
    tunables: str,
    packing: bool,
    microbatch: int,
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
    env = environment(tunables)
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=env
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", help="Dolly rows, .jsonl or .jsonl.gz; default: the embedded sample"
    )
    parser.add_argument("--torch-python", required=True, help="with TRL installed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="counted steps a run")
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated")
    parser.add_argument(
        "--one-row",
        action="store_true",
        help="also run TRL with one row per forward pass, which is not its default",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(arguments.data or embedded_rows(Path(folder))).resolve()
        measure(str(data), arguments)


def embedded_rows(folder: Path) -> Path:
    """Writes the rows that `make finetune` trains on into one file for both sides."""
    parts = sorted((ROOT / "research/data/instructions/sample").glob("*.jsonl"))
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def measure(data: str, arguments: argparse.Namespace) -> None:
    """Runs every side in turn, round after round, and prints the medians."""
    python = str(Path(arguments.torch_python).absolute())
    results: Results = {}
    sides = {"ours": functools.partial(run_ours, data, microbatch=arguments.microbatch)}
    shapes = [(False, 8), (True, 8), (False, 1), (True, 1)]
    for packing, microbatch in shapes[: 4 if arguments.one_row else 2]:
        name = "TRL packed" if packing else "TRL padded"
        sides[name if microbatch == 8 else f"{name}, 1 row a pass"] = functools.partial(
            run_trl, python, data, packing=packing, microbatch=microbatch
        )
    for _ in range(arguments.rounds):
        for dtype in arguments.dtypes.split(","):
            for allocator, tunables in ALLOCATORS.items():
                for name, side in sides.items():
                    found = side(dtype=dtype, steps=arguments.steps, tunables=tunables)
                    results.setdefault((allocator, name, dtype), []).append(found)
                    print(allocator, name, dtype, json.dumps(found), flush=True)
    for allocator in ALLOCATORS:
        show(allocator, results)


def show(allocator: str, results: Results) -> None:
    """Prints, for one allocator setting, each side's better dtype and the ratios."""

    def median(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    print(f"both sides with {allocator}:")
    best: dict[str, tuple[float, float]] = {}
    for (setting, name, dtype), runs in results.items():
        if setting != allocator:
            continue
        speed, memory = (median(runs, k) for k in ("real_tokens_per_s", "peak_rss_gb"))
        print(f"  {name:24s} {dtype:10s} {speed:7.1f} real tokens/s  {memory:5.2f} GB")
        if speed > best.get(name, (0.0, 0.0))[0]:
            best[name] = (speed, memory)
    ours = best.pop("ours")
    for name, theirs in best.items():
        print(
            f"  ours / {name}: {ours[0] / theirs[0]:.2f} times the real tokens/s, "
            f"{ours[1] / theirs[1]:.2f} of the memory"
        )


if __name__ == "__main__":
    main()
