"""Pre-training against Hugging Face's Llama and torch: speed, and what is learnt.

    make bench-pretrain FLAGS="--rounds=3 --steps=12"   speed alone
    make bench-pretrain FLAGS="--learn"                 both train the whole run

Both sides start from the same weights and see the same packed batches in the same
order, made once by this repository's own pipeline; documents are kept apart on both.
Torch uses `LlamaForCausalLM` with SDPA, `torch.optim.AdamW` and, for bfloat16,
autocast. Speed is the tokens a second of the median step after a warm-up, because a
rented machine can slow some steps; the share of slow ones is printed, too. The median
of rounds in turn counts. `--learn` compares held-out bits per byte at the end.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WARMUP_STEPS = 3
SLOW = 1.25  # times the seconds of the median step
FIELDS = ("tokens", "targets", "weights", "segments", "positions")


def read_config(steps: int | None) -> Any:
    """`configs/pretrain_tiny.py`, which needs nothing that torch has not."""
    from configs import pretrain_tiny
    from research.config.run_config import from_config_dict

    config = pretrain_tiny.get_config()
    config.export = False
    if steps is not None:
        config.steps = steps
    return from_config_dict(config)


def prepare(config: Any, folder: Path) -> None:
    """Writes the first weights, all batches and the learning rates for torch."""
    from research.formats.huggingface import huggingface_export
    from research.parallel import mesh
    from research.tasks import task_registry
    from research.train.step.definition_from_config import (
        load_start,
        make_step_definition,
    )
    from research.train.step.schedules import make_schedule

    base = task_registry.open_start(config)
    devices = mesh.make_mesh(config.mesh)
    objective = task_registry.make_objective(config, devices)
    definition = make_step_definition(config, base, devices, objective)
    task = task_registry.load_task(config, base)
    params, _ = load_start(definition, base)
    huggingface_export.export(
        definition.model, params, base.tokenizer, folder / "model"
    )
    rows = list(range(config.data.batch_size))
    batches = task.batches(rows)
    save(folder / "train.npz", [next(batches) for _ in range(config.steps)])
    save(folder / "held_out.npz", task.held_out(config.data.batch_size, rows))
    schedule = make_schedule(config.optim, config.steps)
    settings = {
        "rates": [float(schedule(n)) for n in range(1, config.steps + 1)],
        "bytes": sum(task.held_out_bytes.values()),
        "optim": dataclasses.asdict(config.optim),
        "warmup_steps": WARMUP_STEPS,
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def save(path: Path, batches: list[Any]) -> None:
    arrays = {
        name: np.stack([np.asarray(getattr(batch, name)) for batch in batches])
        for name in FIELDS
    }
    np.savez(path, **arrays)


def speed(steps: list[tuple[int, float]]) -> dict[str, float]:
    """The tokens a second of the median step, and the share of slow ones."""
    rates = [tokens / seconds for tokens, seconds in steps]
    median = statistics.median(rates)
    slow = sum(rate < median / SLOW for rate in rates) / len(rates)
    return {"tokens_per_s": median, "slow_steps": slow}


def run_ours(config: Any, dtype: str) -> dict[str, Any]:
    """Trains through the real command and reads its `metrics.jsonl`."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "research.train",
            "--config=configs/pretrain_tiny.py",
            f"--config.run_dir={run_dir}",
            f"--config.model.dtype={dtype}",
            f"--config.steps={config.steps}",
            "--config.export=False",
            "--config.eval.every=100000",
            "--config.eval.samples_every=100000",
            "--config.checkpoint.every=100000",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    counted = [x for x in lines if x["kind"] == "train" and x["step"] > WARMUP_STEPS]
    last = [x for x in lines if x["kind"] == "eval"][-1]
    return {
        **speed([(x["tokens"], x["step_s"]) for x in counted]),
        "bits_per_byte": last["bits_per_byte"],
        "peak_rss_gb": counted[-1]["memory_gb"],
    }


def run_torch(python: str, folder: Path, dtype: str) -> dict[str, Any]:
    side = ROOT / "tests/bench/torch_pretrain_side.py"
    command = [python, str(side), f"--folder={folder}", f"--dtype={dtype}"]
    # Both sides inherit one environment, and so one allocator setting.
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return speed(found.pop("steps")) | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", required=True, help="with transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="of each speed run")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--learn", action="store_true", help="the whole run, once")
    arguments = parser.parse_args()
    python = str(Path(arguments.torch_python).absolute())
    config = read_config(None if arguments.learn else arguments.steps)
    rounds = 1 if arguments.learn else arguments.rounds
    dtypes = ["bfloat16"] if arguments.learn else arguments.dtypes.split(",")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(config, Path(name))
        for _ in range(rounds):
            for dtype in dtypes:
                for side in ("ours", "torch"):
                    result = (
                        run_ours(config, dtype)
                        if side == "ours"
                        else run_torch(python, Path(name), dtype)
                    )
                    found.setdefault((side, dtype), []).append(result)
                    print(side, dtype, json.dumps(result), flush=True)
    show(found, dtypes)


def show(found: dict[tuple[str, str], list[dict[str, Any]]], dtypes: list[str]) -> None:
    keys = ("tokens_per_s", "bits_per_byte", "peak_rss_gb", "slow_steps")
    for dtype in dtypes:
        ours, torch = (
            [statistics.median(run[key] for run in found[side, dtype]) for key in keys]
            for side in ("ours", "torch")
        )
        print(
            f"{dtype}: ours {ours[0]:.0f} tokens/s, torch {torch[0]:.0f}: "
            f"{ours[0] / torch[0]:.2f} times as fast; bits per byte {ours[1]:.4f} and "
            f"{torch[1]:.4f} ({ours[1] / torch[1] - 1:+.2%}); "
            f"memory {ours[2]:.2f} and {torch[2]:.2f} GB; "
            f"slow steps {ours[3]:.0%} and {torch[3]:.0%}"
        )


if __name__ == "__main__":
    main()
