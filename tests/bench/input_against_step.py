"""The input pipeline against what a step needs: how many times faster it reads.

    python tests/bench/input_against_step.py [--steps=10]

For each embedded job: batches as training pulls them, on one core, against the real
command's steps on this machine; then pre-training's batches against the best that
`research.plan` promises one host of the 1B recipe's slice. Goal: at least 20 times.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
JOBS = ("finetune_dolly", "pretrain_tiny")
HOST_JOB = "pretrain_1b"
GOAL = 20


def read_config(name: str, **data: int) -> Any:
    """The shipped config as the trainer sees it, with other `data` knobs."""
    from research.config.run_config import from_config_dict

    config = importlib.import_module(f"configs.{name}").get_config()
    for knob, value in data.items():
        setattr(config.data, knob, value)
    return from_config_dict(config)


def pulled(config: Any, seconds: float) -> float:
    """Tokens a second of the iterator that training pulls from, on one core."""
    from research.tasks import task_registry

    base = task_registry.open_start(config)
    task = task_registry.load_task(config, base)
    batches = task.batches(list(range(config.data.batch_size)))
    next(batches)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    begun, tokens = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        tokens += int((next(batches).segments > 0).sum())
    rate = tokens / (time.perf_counter() - begun)
    os.sched_setaffinity(0, cores)
    return rate


def trained(name: str, steps: int) -> float:
    """Tokens a second of the real command's last steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "research.train", f"--config=configs/{name}.py",
            f"--config.run_dir={folder}/run", f"--config.steps={steps + 2}",
            "--config.export=False", "--config.eval.max_new_tokens=1",
        ]  # fmt: skip
        if read_config(name).data.kind == "instructions":
            command += ["--config.eval.prompts=1", "--config.data.held_out=8"]
            command += ["--config.eval.answers_rows=0"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        text = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8")
    lines = [x for x in map(json.loads, text.splitlines()) if x["kind"] == "train"]
    counted = lines[2:]
    return sum(x["tokens"] for x in counted) / sum(x["step_s"] for x in counted)


def host_need() -> tuple[str, float]:
    """Tokens a second of one host of `HOST_JOB`'s slice when everything overlaps."""
    from research.models.presets import preset
    from research.plan import planner
    from research.plan.planned_devices import parse_topology

    config = read_config(HOST_JOB)
    target = parse_topology(config.runtime.topology)
    plan = planner.plan_estimate(config, preset(config.model.preset), target)
    hosts = target.count / target.chip.hosted
    return target.name, plan.best.tokens_per_second / hosts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="counted, of each job")
    parser.add_argument("--seconds", type=float, default=5.0, help="of pulling batches")
    arguments = parser.parse_args()
    for name in JOBS:
        rate = pulled(read_config(name), arguments.seconds)
        show(name, rate, "this machine's step", trained(name, arguments.steps))
    rows = read_config(HOST_JOB)
    config = read_config("pretrain_tiny", seq_len=rows.data.seq_len)
    slice_name, need = host_need()
    rate = pulled(config, arguments.seconds)
    show(f"pre-training at {rows.data.seq_len}", rate, f"a host of {slice_name}", need)


def show(what: str, rate: float, who: str, need: float) -> None:
    print(
        f"{what}: input {rate:,.0f} tokens/s, {who} takes {need:,.0f}: "
        f"{rate / need:,.0f} times (goal {GOAL})",
        flush=True,
    )


if __name__ == "__main__":
    main()
