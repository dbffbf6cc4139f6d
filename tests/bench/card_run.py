"""A whole run of `research.train` on this device, and a resume from its middle.

    python tests/bench/card_run.py '{"folder": "/tmp/runs"}'

A child of `accelerator.py`; prints JSON lines. The run pre-trains a small model on this
repository's own text, evaluates, saves, writes a sample, exports and reports. A copy of
it that lacks the second half is then resumed, as after a kill, and its losses are
compared bit for bit. Adapters then train on the weights of the first run. Starts no JAX
itself, so the children have the whole device.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def train(folder: Path, steps: int, knobs: dict[str, Any]) -> float:
    """Trains or resumes a run; returns its seconds.

    `knobs` come last. The size of a product with the head is the default one, and not
    that of the config.

    Raises:
      RuntimeError: it ended with an error; standard error has its own words.
    """
    knobs = {
        "model.loss_chunk": 0,
        "run_dir": folder,
        "steps": steps,
        "text.sources": (f"code={ROOT / 'research' / 'train'}",),
        "text.held_out_share": 0.2,
        "text.cache_dir": folder.parent / "tokens",
        "eval.every": steps // 2,
        "eval.samples_every": 0,
        "eval.max_new_tokens": 8,
        "checkpoint.every": steps // 2,
        "checkpoint.keep_last": 2,
        "runtime.progress": "lines",
        "runtime.compilation_cache": folder.parent / "compiled",
        **knobs,
    }
    command = [sys.executable, "-m", "research.train"]
    command += ["--config=configs/pretrain_tiny.py"]
    command += [f"--config.{name}={value}" for name, value in knobs.items()]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"research.train ended with {done.returncode}")
    return time.monotonic() - begun


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """By step: the loss and the gradient norm, as `metrics.jsonl` has them."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "train"]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in steps}


def as_killed(run: Path, step: int, target: Path) -> Path:
    """A copy of a finished run, as if it had been killed before the save after `step`.

    Raises:
      RuntimeError: the run has no checkpoint of that step and of a later one.
    """
    shutil.copytree(run, target)
    (target / "complete.json").unlink()
    found = [p for p in (target / "checkpoints").iterdir() if p.name.isdigit()]
    later = [p for p in found if int(p.name) > step]
    if not later or len(later) == len(found):
        raise RuntimeError(f"the run's checkpoints are {[p.name for p in found]}")
    for place in later:
        shutil.rmtree(place)
    return target


def measure(
    folder: str, preset: str = "llama-6m", steps: int = 8, seq: int = 1024
) -> Iterator[dict[str, Any]]:
    whole = Path(folder) / "whole"
    shape = {"data.seq_len": seq}
    random = {"model.preset": preset, "text.tokenizer": "byte"}
    seconds = train(whole, steps, {**shape, **random})
    first = losses(whole)
    report = (whole / "report.md").is_file()
    yield {"run_s": seconds, "losses": [first[n][0] for n in sorted(first)],
           "report": report}  # fmt: skip
    broken = as_killed(whole, steps // 2, Path(folder) / "resumed")
    seconds = train(broken, steps, {**shape, **random})
    again = losses(broken)
    half = range(steps // 2 + 1, steps + 1)
    yield {
        "resume_s": seconds,
        "exact": all(first[n] == again[n] for n in half),
        "equal_steps": sum(first[n] == again[n] for n in half),
        "of": len(half),
    }
    adapted = Path(folder) / "adapted"
    base = {"model.init_from": whole, "model.preset": "", "trainable": "lora"}
    seconds = train(adapted, steps, {**shape, **base})
    after = losses(adapted)
    yield {"lora_s": seconds, "losses": [after[n][0] for n in sorted(after)]}


if __name__ == "__main__":
    for result in measure(**json.loads(sys.argv[1])):
        print(json.dumps(result), flush=True)
