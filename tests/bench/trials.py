"""The accelerator benchmarks share this: each trial is a process of its own.

A trial that runs out of memory ends its process and nothing else, and the next one
finds the whole card free. So this process never touches the device itself: JAX would
take most of its memory at once.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)
ASK = """
import json, jax
d = jax.devices()[0]
capability = str(getattr(d, "compute_capability", "0.0"))
print(json.dumps([d.platform, d.device_kind, capability, jax.__version__]))
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """The first device that JAX finds here."""

    platform: str
    kind: str
    capability: str
    jax: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting of a sweep, and what it gave.

    Attributes:
      way: how it was computed, as the table names it.
      micro: rows a pass.
      found: the numbers; None where it failed.
      failure: why, in a few words.
    """

    way: str
    micro: int
    found: dict[str, Any] | None
    failure: str = ""

    @property
    def speed(self) -> float:
        return self.found["tokens_per_s"] if self.found else 0.0

    @property
    def out_of_memory(self) -> bool:
        return self.failure == "out of memory"


def environment(*, ours: bool) -> dict[str, str]:
    """The variables of a trial; both sides get the same allocator settings."""
    if not ours:
        return dict(os.environ)
    # JAX takes 75 % of a GPU unless told otherwise; torch takes what it needs.
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}


def find_device(preset: str) -> Device:
    """Return the accelerator of this machine, found out by another process.

    Raises:
      UserError: there is no accelerator, and no `preset` small enough for a CPU.
    """
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise UserError(f"JAX finds no device here: {last_line(done.stderr)}")
    device = Device(*json.loads(done.stdout.splitlines()[-1]))
    if device.platform == "cpu" and not preset:
        raise UserError(
            "no accelerator here, JAX finds a cpu: install jax[cuda13] on a GPU, "
            "jax[tpu] on a TPU, or try the script on this CPU with --preset=tiny"
        )
    return device


def last_line(text: str) -> str:
    """The error that a process ended with, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(error|Error)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:200]


def run_trial(
    way: str, micro: int, command: Sequence[str], *, ours: bool, timeout: float
) -> Trial:
    """Runs a command whose last line of output is a JSON object with its numbers."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
            env=environment(ours=ours),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Trial(way, micro, None, f"stopped after {timeout:.0f} s")
    if done.returncode == 0:
        return Trial(way, micro, json.loads(done.stdout.splitlines()[-1]))
    # The kernel kills with signal 9 what takes too much of the host's memory.
    if done.returncode == -9 or NO_MEMORY.search(done.stderr):
        return Trial(way, micro, None, "out of memory")
    return Trial(way, micro, None, last_line(done.stderr))


def our_step(arguments: argparse.Namespace, micro: int, *knobs: str) -> list[str]:
    """The command of `random_step.py`, of what `add_common` has read."""
    return [
        sys.executable,
        str(BENCH / "random_step.py"),
        f"--config={arguments.config}",
        f"--preset={arguments.preset}",
        f"--rows={arguments.rows}",
        f"--micro={micro}",
        f"--seq={arguments.seq}",
        f"--trained={arguments.trained}",
        f"--steps={arguments.steps}",
        *(f"--knob={knob}" for knob in knobs),
        "--json",
    ]


def sweep(
    trial: Callable[[str, int], Trial], ways: Sequence[str], sizes: Sequence[int]
) -> Iterator[Trial]:
    """Each way with ever more rows a pass, until memory runs out."""
    for way in ways:
        for micro in sorted(sizes):
            done = trial(way, micro)
            yield done
            if done.out_of_memory:
                break


def best(trials: Sequence[Trial], side: str) -> Trial:
    """The fastest.

    Raises:
      UserError: none has finished.
    """
    fastest = max(trials, key=lambda trial: trial.speed)
    if fastest.found is None:
        raise UserError(f"no trial of {side} has finished: {trials[0].failure}")
    return fastest


def add_common(parser: argparse.ArgumentParser, *, config: str, rows: int) -> None:
    """The flags of every sweep of our own step."""
    add = parser.add_argument
    add("--config", default=config, help="file in configs/")
    add("--preset", default="", help="another shape; a small one may run on a CPU")
    add("--rows", type=int, default=rows, help="rows of an optimizer step")
    add("--seq", type=int, default=2048, help="tokens of a row")
    add("--micro", default="1,2,4,8,16", help="rows a pass, comma-separated")
    add("--remat", default="none,dots,full", help="comma-separated")
    add("--trained", type=float, default=1.0, help="share of positions with a loss")
    add("--steps", type=int, default=5, help="that count, after two that do not")
    add("--timeout", type=float, default=900.0, help="seconds of one trial")


def sizes(arguments: argparse.Namespace) -> list[int]:
    """`--micro`, each of which divides `--rows`.

    Raises:
      UserError: it is no list of such numbers.
    """
    asked = [part for part in arguments.micro.split(",") if part.isdigit()]
    fitting = [int(part) for part in asked if arguments.rows % max(int(part), 1) == 0]
    if not fitting or 0 in fitting or len(asked) != len(arguments.micro.split(",")):
        raise UserError(
            f"--micro={arguments.micro}: numbers apart from each other by commas, of "
            f"which some must divide --rows={arguments.rows}"
        )
    return fitting


def head(device: Device, *columns: str) -> None:
    """When, where and with which command; then the head of a table."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{now}, {device.kind}, JAX {device.jax}")
    print(f"python {shlex.join(sys.argv)}\n")
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)
