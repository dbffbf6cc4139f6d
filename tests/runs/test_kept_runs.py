"""Whole run directories, as earlier programs wrote them, open and can be resumed.

They are in `tests/golden/kept/runs`, each with the date of its program, without
`loss.png` and `report.html`, which nothing reads. A commit that changes what is in a
run directory adds the layout of before:

    git worktree add /tmp/before COMMIT
    KEPT_BY=/tmp/before python -m pytest tests/runs/test_kept_runs.py
"""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from doors import run_door
from rich.console import Console
from small_run import saved_state
from tiny_model import make_tiny_model

from research.checkpoints.checksums import find_damage
from research.config.config_file import load_config_file
from research.config.run_config import Config, MeshConfig, from_config_dict
from research.report import run_page, terminal
from research.report.run_results import read_results
from research.runs.lineage.start_pins import pin_start
from research.runs.phase_timer import PhaseTimer
from research.runs.reopen import reopen
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks import task_registry
from research.train import __main__ as train_door
from research.train import start_to_report

KEPT = Path(__file__).parents[1] / "golden" / "kept" / "runs"
STEPS = 4
CONFIG = f"""
from research.config import defaults

def get_config():
    config = defaults()
    config.model.init_from = "model"
    config.model.dtype = "float32"
    config.steps = {STEPS}
    config.lora.rank = 2
    config.data.path = "rows.jsonl"
    config.data.seq_len = 64
    config.data.batch_size = 2
    config.data.held_out = 4
    config.optim.learning_rate = 1e-2
    config.eval.every = 2
    config.eval.prompts = 1
    config.eval.max_new_tokens = 8
    config.checkpoint.every = 2
    config.checkpoint.keep_last = 1
    config.runtime.peak_tflops = 0.05
    return config
"""


def record(program, folder):
    """Trains by the checkout `program` in `folder`, and keeps the run directory."""
    show = ["git", "-C", program, "show", "-s", "--date=format-local:%Y-%m-%d-%H%M"]
    stamp = {"env": os.environ | {"TZ": "UTC"}, "check": True, "text": True}
    date = subprocess.run(
        [*show, "--format=%cd"], stdout=subprocess.PIPE, **stamp
    ).stdout.strip()
    env = os.environ | {"PYTHONPATH": program, "JAX_NUM_CPU_DEVICES": "1"}
    train = [sys.executable, "-m", "research.train", "--config=config.py"]
    command = [*train, f"--config.run_dir=runs/{date}"]
    subprocess.run(command, cwd=folder, env=env, check=True)
    kept = shutil.copytree(folder / "runs" / date, KEPT / date, dirs_exist_ok=True)
    for name in ("loss.png", "report.html"):
        (kept / name).unlink(missing_ok=True)
    config = (kept / "config.json").read_text()
    (kept / "config.json").write_text(config.replace(str(folder), "/elsewhere"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the base model, the rows, and `runs`."""
    folder = tmp_path_factory.mktemp("kept")
    make_tiny_model(folder / "model")
    rows = [
        {
            "instruction": f"How many legs have {n} cats?",
            "response": f"{4 * n} legs.",
            "category": ("sums", "legs")[n % 2],
        }
        for n in range(1, 25)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    (folder / "config.py").write_text(CONFIG)
    if program := os.environ.get("KEPT_BY"):
        record(program, folder)
    shutil.copytree(KEPT, folder / "runs", dirs_exist_ok=True)
    return folder


@pytest.fixture(params=sorted(path.name for path in KEPT.iterdir()))
def run(request, small, monkeypatch):
    """A run directory that was moved here, with its data, from another machine."""
    monkeypatch.chdir(small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small / "cache"))
    return Path("runs") / request.param


def wanted(run, **changes) -> Config:
    """The config of the command that began the run, as the program of now reads it."""
    found = from_config_dict(load_config_file("config.py"))
    return dataclasses.replace(found, run_dir=str(run), **changes)


def test_it_is_complete_and_the_same_command_says_so(run, small):
    flags = ("--config=config.py", f"--config.run_dir={run}")
    done = run_door(train_door.main, small, "train", *flags)
    assert done.returncode == 0 and f"{run} is complete" in done.stderr, done.stderr


def test_its_history_and_its_checkpoint_are_whole(run):
    history = History(RunDir(run).history, PhaseTimer())
    assert (history.saved, history.skipped, history.accepted) == (STEPS, [], {})
    goodput = history.goodput()
    assert 0 < goodput.share < 1 and dict(goodput.parts)["compile"] > 0
    assert find_damage(run / "checkpoints" / str(STEPS)) == []


def test_its_report_shows_the_same_losses(run):
    facts = json.loads((run / "complete.json").read_text())
    wall_time = History(RunDir(run).history, PhaseTimer()).goodput().parts
    results = read_results(run, facts, wall_time)
    assert [line["step"] for line in results.train] == [1, 2, 3, 4]
    assert [line["step"] for line in results.evaluations] == [0, 2, 4]
    before = (run / "report.md").read_text().splitlines()
    losses = [line for line in before if line.startswith(("| legs", "| sums", "| all"))]
    assert len(losses) == 3
    assert {*losses} <= {*run_page.format_report(results).splitlines()}
    console = Console(record=True, width=200, file=io.StringIO())
    terminal.show_results(console, results)
    assert losses[-1].split(" | ")[2] in console.export_text()


def test_its_parameters_open(run):
    found = reopen(run)
    adapters = {
        path: np.asarray(x) for path, x in jax.tree.leaves_with_path(found.params)
    }
    assert len(adapters) == 14 and all(np.isfinite(x).all() for x in adapters.values())
    assert all(x.any() for x in adapters.values()), "each was trained"


def test_it_resumes_from_its_state_on_the_rows_that_it_had(run):
    """All that a resume checks and restores before it compiles a step."""
    folder = RunDir(run)
    config = pin_start(folder, wanted(run))
    assert folder.check_config(wanted(run)) == {}
    restored = saved_state(run)
    assert restored.step == STEPS and restored.position
    base = task_registry.open_start(config, folder.own_tokenizer)
    task = task_registry.load_task(config, base)
    identity = {
        "base model": base.fingerprint,
        "tokenizer": base.tokenizer.fingerprint,
        "data": task.sha256,
    }
    assert folder.check_identity(identity) == {}


@pytest.mark.soak
def test_it_trains_two_more_steps(run):
    eight = MeshConfig(data=2, tensor=2, context=2)
    longer = wanted(run, steps=STEPS + 2, accept=("steps",), mesh=eight)
    assert start_to_report.train([longer]) == 0
    start = json.loads((run / "run.json").read_text())["starts"][-1]
    assert (start["first"], start["step"], start["cause"]) == (STEPS, STEPS + 2, "done")
