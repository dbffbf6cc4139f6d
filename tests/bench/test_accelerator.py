"""The script for accelerators: its children, its budget, and what it keeps of failures.

The whole script with tiny sizes is `soak`: it compiles seven steps.
"""

import contextlib
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import PATIENCE, wait_until

from configs import finetune_8b, pretrain_1b
from research.config.knob_groups import ModelConfig
from research.config.run_config import from_config_dict

BENCH = Path(__file__).resolve().parent


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import accelerator

    return accelerator


@pytest.fixture
def run_child(accelerator, monkeypatch, tmp_path):
    """Results of one trial whose child is the given program."""
    monkeypatch.setattr(accelerator, "BENCH", tmp_path)

    def call(program, budget=2.0 * PATIENCE, limit=1.0 * PATIENCE, **fields):
        (tmp_path / "card_measures.py").write_text(program)
        trial = accelerator.card("one", "step", 1.0, limit, **fields)
        return list(accelerator.measure([trial], budget, "", tmp_path))

    return call


def test_results_before_a_failure_are_kept_with_the_end_of_stderr(run_child):
    found, failed = run_child(
        "print('{\"ms\": 2.5}', flush=True)\nraise OSError('gone')"
    )
    assert found["ms"] == 2.5 and found["trial"] == "one"
    assert failed["failed"] == "exit code 1"
    assert failed["stderr"][-1] == "OSError: gone"


def test_a_child_that_hangs_is_stopped(run_child):
    [failed] = run_child("import time; time.sleep(600)", limit=0.2)
    assert failed["failed"] == "stopped after 0.2 s"


def test_nothing_of_a_child_outlives_it(run_child):
    program = """
import subprocess, sys
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f'{{"own": {own.pid}}}')
"""
    [found] = run_child(program)
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(found["own"])
        wait_until(lambda: own.status() == psutil.STATUS_ZOMBIE)


def test_where_memory_runs_out_the_smaller_size_is_tried(run_child):
    program = """
import json, sys
if json.loads(sys.argv[2])["micro"] > 2:
    sys.exit("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory")
print('{"ms": 1.0}')
"""
    large, small = run_child(program, micro=4, smaller={"micro": 2})
    assert large["failed"] == "out of memory" and large["settings"]["micro"] == 4
    assert small["ms"] == 1.0 and small["settings"]["micro"] == 2
    [only] = run_child(program, micro=4)
    assert only["failed"] == "out of memory"


def test_what_the_budget_has_no_time_for_is_named(run_child):
    [result] = run_child("raise SystemExit('must not run')", budget=0.5)
    assert result["not_run"] == "0 s left, and it takes about 1 s"


def test_what_cannot_run_here_is_named(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "TRAIN_NEEDS", ("json", "no_such_module"))
    trials = [t for t in accelerator.TRIALS if t.name in ("peft", "train")]
    peft, train = accelerator.measure(trials, 1e4, "", tmp_path)
    assert peft["not_run"].startswith("needs --torch-python")
    assert train["not_run"] == "needs no_such_module"


def test_the_summary_compares_the_best_of_both_sides(accelerator):
    same = {"trained": 7, "positions": 5}
    results = [
        {"trial": "pretrain", "mfu": 0.41, "tokens_per_s": 3.0},
        {"trial": "pretrain-dots", "mfu": 0.525, "tokens_per_s": 4.0},
        {"trial": "lora", "tokens_per_s": 30.0, **same},
        {"trial": "lora-dots", "failed": "out of memory", "stderr": ["no room"]},
        {"trial": "peft", "tokens_per_s": 15.0, **same},
        {"trial": "peft-bfloat16", "tokens_per_s": 20.0, **same, "positions": 6},
    ]
    lines = list(accelerator.summary(results))
    assert "best MFU 52.5% (pretrain-dots; goal 50%)" in lines
    assert lines[-1].startswith("LoRA: 1.50 times PEFT (lora 30 tokens/s, peft-bf")
    assert lines[-1].endswith("NOT EQUAL in positions")
    assert any("no room" in line for line in lines)


def test_every_trial_has_a_tiny_size_and_settings_that_its_measure_takes(accelerator):
    import card_measures
    import card_run

    assert len({trial.name for trial in accelerator.TRIALS}) == len(accelerator.TRIALS)
    for trial in accelerator.TRIALS:
        for each in (trial, accelerator.tiny(trial)):
            settings = dict(each.settings)
            if each.script == "peft_side.py":
                continue
            measure = card_run.measure
            if each.script == "card_measures.py":
                measure = card_measures.MEASURES[settings.pop("measure")]
            else:
                settings["folder"] = "."
            inspect.signature(measure).bind(**settings)


def test_the_steps_are_those_of_the_shipped_configs(accelerator):
    import card_measures

    for name, file in (("full", pretrain_1b), ("lora", finetune_8b)):
        config = from_config_dict(file.get_config())
        assert config.trainable == name
        assert dataclasses.asdict(config.optim) == dataclasses.asdict(
            card_measures.OPTIM[name]
        )
        assert config.model.loss_chunk == ModelConfig().loss_chunk


@pytest.mark.soak
def test_everything_runs_with_tiny_sizes(tmp_path):
    out = tmp_path / "card.jsonl"
    command = [sys.executable, BENCH / "accelerator.py", "--tiny", "--budget=1200"]
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = [json.loads(line) for line in out.read_text().splitlines()]
    ran = {result["trial"] for result in results if "not_run" not in result}
    without_peft = {
        "device", "kernels", "pretrain", "lora", "resume", "decode", "train"
    }  # fmt: skip
    assert without_peft <= ran
    exact = [r["exact"] for r in results if "exact" in r]
    assert exact == [True, True]
