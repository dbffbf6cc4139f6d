"""The script for accelerators: its children, its budget, and what it keeps of failures.

The whole script runs with tiny sizes, in forks of one process that has imported JAX.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import psutil
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from waiting import PATIENCE, wait_until

from configs import finetune_8b, pretrain_1b
from research.config.knob_groups import ModelConfig
from research.config.run_config import from_config_dict
from research.core.errors import UserError
from research.models import attention_kernels

BENCH = Path(__file__).resolve().parent


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import accelerator

    return accelerator


@pytest.fixture
def run_child(accelerator, monkeypatch, tmp_path):
    """Results of one trial whose child is the given program."""
    import card_children
    import card_trials

    monkeypatch.setattr(card_children, "BENCH", tmp_path)

    def call(program, budget=2.0 * PATIENCE, limit=1.0 * PATIENCE, **fields):
        (tmp_path / "card_measures.py").write_text(program)
        trial = card_trials.card("one", "step", 1.0, limit, **fields)
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


def test_a_result_is_yielded_while_its_child_still_runs(accelerator, tmp_path):
    """And a child whose results nobody awaits any more is stopped."""
    import card_children

    program = "print('{\"ms\": 1}', flush=True); import time; time.sleep(6000)"
    child = card_children.Child([sys.executable, "-c", program], dict(os.environ))
    with contextlib.closing(child.results()) as results:
        assert next(results) == {"ms": 1}
        own = psutil.Process(child._pid)
        assert own.is_running() and own.status() != psutil.STATUS_ZOMBIE
    assert not psutil.pid_exists(own.pid)


def test_what_a_library_prints_is_no_result(run_child):
    program = (
        "print('{1: no JSON')\nprint('[]')\nprint('{\"ms\": 1}')\nraise SystemExit(3)"
    )
    found, failed = run_child(program)
    assert found["ms"] == 1
    assert failed["stderr"] == ["{1: no JSON", "[]"]


@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "OMP_NUM_THREADS"])
def test_a_child_with_settings_that_a_fork_has_behind_it_is_no_fork(
    accelerator, monkeypatch, name
):
    import card_children

    monkeypatch.setattr(card_children, "_forks", True)
    other = {"XLA_FLAGS": "--a", "NCCL_NVLS_ENABLE": "1"}
    other |= {"JAX_COMPILATION_CACHE_DIR": "/nowhere"}
    assert card_children.can_fork(os.environ | other)
    own = os.environ | {name: "1"}
    program = f"import os; print('{{\"new\": ' + os.environ['{name}'] + '}}')"
    child = card_children.Child([sys.executable, "-c", program], own, call=os.abort)
    assert [*child.results()] == [{"new": 1}] and child.failure == {}


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


def test_where_memory_runs_out_smaller_sizes_are_tried(run_child):
    program = """
import json, sys
if json.loads(sys.argv[2])["micro"] > 2:
    sys.exit("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory")
print('{"ms": 1.0}')
"""
    *large, small = run_child(program, micro=8, halved="micro")
    assert [(r["failed"], r["settings"]["micro"]) for r in large] == [
        ("out of memory", 8),
        ("out of memory", 4),
    ]
    assert small["ms"] == 1.0 and small["settings"]["micro"] == 2
    [only] = run_child(program, micro=4)
    assert only["failed"] == "out of memory"


def test_no_trial_takes_the_time_that_a_later_one_needs(accelerator):
    """Unless it is spare, and each gets at least its own."""
    import card_trials

    assert sum(trial.needs for trial in card_trials.MAIN) <= 0.95 * 420
    one = card_trials.card("one", "step", 40, 150)
    two = card_trials.card("two", "step", 30, 100)
    extra = card_trials.card("extra", "step", 500, 500, spare=True)
    assert one.seconds_for(100, [two, extra]) == 70
    assert one.seconds_for(60, [two, two, extra]) == 40
    assert one.seconds_for(1000, [two]) == 150
    assert one.seconds_for(30, []) == 30


def test_what_the_budget_has_no_time_for_is_named(run_child):
    [result] = run_child("raise SystemExit('must not run')", budget=0.5)
    assert result["not_run"] == "0 s left, and it takes about 1 s"


def test_what_cannot_run_here_is_named(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "TRAIN_NEEDS", ("json", "no_such_module"))
    trials = [t for t in accelerator.TRIALS if t.name in ("peft", "train")]
    peft, train = accelerator.measure(trials, 1e4, "", tmp_path)
    assert peft["not_run"].startswith("needs --torch-python")
    assert train["not_run"] == f"needs no_such_module in {sys.executable}"


@pytest.mark.parametrize(
    "flag, wrong",
    [
        ("--torch-python=/nowhere/python", "/nowhere/python: it does not start"),
        ("--torch-python=false", "false: it does not start"),
        ("--out=/nowhere/card.jsonl", "/nowhere/card.jsonl: No such file"),
        ("--only=pretrian", "no trial pretrian"),
    ],
)
def test_what_is_wrong_is_said_before_the_device_is_used(accelerator, flag, wrong):
    with pytest.raises(UserError, match=wrong):
        accelerator.choose(accelerator.parse([flag]))


def test_the_chip_is_always_asked_for(accelerator):
    """The compiler's settings depend on it."""
    chosen = accelerator.choose(accelerator.parse(["--only=lora"]))
    assert [trial.name for trial in chosen] == ["device", "lora"]


def test_sizes_of_a_card_are_not_run_on_a_cpu(accelerator, capsys):
    found = iter([{"trial": "device", "platform": "cpu"}])
    written = accelerator.recorded(found, accelerator.parse([]))
    with pytest.raises(UserError, match="finds no GPU and no TPU"):
        next(written)
    assert '"platform": "cpu"' in capsys.readouterr().out


@pytest.mark.parametrize("kernel, platform", [("cudnn", "cuda"), ("splash", "tpu")])
def test_a_kernel_that_was_chosen_is_looked_for_in_the_program(
    accelerator, monkeypatch, kernel, platform
):
    """As it is lowered for a device that is not here."""
    import card_job

    there = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", there)
    monkeypatch.setattr(
        fused_attention_stablehlo, "check_compute_capability", lambda _: True
    )

    def attend(q, k, v, segments):
        return attention_kernels.packed_attention(
            q, k, v, segments, segments, kernel=kernel, block=128
        )

    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    arrays = x, x, x, jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    program = jax.jit(attend).trace(*arrays).lower(lowering_platforms=(platform,))
    found = card_job.attention_calls(kernel, program.as_text("hlo"))
    assert found["right"] and sum(found["calls"].values()) >= 1
    plain = jax.jit(lambda x: x + 1).lower(x).as_text("hlo")
    assert not card_job.attention_calls(kernel, plain)["right"]
    assert card_job.attention_calls("xla", plain)["right"]


def test_a_comparison_in_codes_needs_bitsandbytes(accelerator, tmp_path):
    """In the other interpreter: without it the line says so, and nothing is started."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho bitsandbytes\n")
    python.chmod(0o755)
    trials = [t for t in accelerator.TRIALS if t.name == "peft-nf4"]
    [missing] = accelerator.measure(trials, 1e4, str(python), tmp_path)
    assert missing["not_run"] == f"needs bitsandbytes in {python}"


def test_the_summary_compares_the_best_of_both_sides(accelerator):
    same = {"trained": 7, "positions": 5, "attention": "flash"}
    results = [
        {"trial": "pretrain", "mfu": 0.41, "peak": "9", "tokens_per_s": 3.0},
        {"trial": "pretrain-dots", "mfu": 0.525, "peak": "9", "tokens_per_s": 4.0},
        {"trial": "lora", "tokens_per_s": 30.0, **same},
        {"trial": "lora-dots", "failed": "out of memory", "stderr": ["no room"]},
        {"trial": "peft", "tokens_per_s": 15.0, **same},
        {"trial": "peft-bfloat16", "tokens_per_s": 20.0, **same, "positions": 6},
    ]
    lines = list(accelerator.summary(results))
    assert "best MFU 52.5% of 9 (pretrain-dots; goal 50%)" in lines
    assert lines[-1].startswith("LoRA over bfloat16: 1.50 times PEFT (lora 30 tokens/s")
    assert lines[-1].endswith("NOT EQUAL in positions")
    assert any("no room" in line for line in lines)


def test_a_base_in_codes_is_compared_with_equal_settings_alone(accelerator):
    def step(trial, micro, speed, gigabytes, **codes):
        return {
            "trial": trial, "settings": {"micro": micro, **codes}, "trained": 7,
            "positions": 5, "tokens_per_s": speed, "step_gb": gigabytes,
            "attention": f"{trial}'s",
            "frozen_gb": gigabytes / 2,
        }  # fmt: skip

    results = [
        step("lora", 4, 40.0, 20.0),
        step("lora-dots", 8, 50.0, 40.0),
        step("lora-nf4", 4, 30.0, 8.0, quantize="nf4"),
        step("lora-int8", 2, 35.0, 9.0, quantize="int8"),
        step("peft-nf4", 2, 12.0, 10.0, quantize="nf4"),
    ]
    lines = list(accelerator.summary(results))[len(results) :]
    assert lines == [
        "LoRA over nf4: 2.50 times PEFT (lora-nf4 30 tokens/s, peft-nf4 12); "
        "attention lora-nf4's and peft-nf4's",
        "base in nf4: 0.75 of bfloat16's speed, 0.40 of the step's memory, 0.40 of the "
        "frozen weights'",
    ]


@pytest.fixture
def peft_side(accelerator, monkeypatch):
    """The other side's module, where its libraries are not."""
    for name in ("peft", "torch", "torch.nn", "transformers"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    monkeypatch.delitem(sys.modules, "peft_side", raising=False)
    import peft_side

    yield peft_side
    del sys.modules["peft_side"]


def test_every_trial_has_settings_that_its_measure_takes(accelerator, peft_side):
    import card_measures
    import card_run

    assert len({trial.name for trial in accelerator.TRIALS}) == len(accelerator.TRIALS)
    for trial in accelerator.TRIALS:
        for each in (trial, accelerator.tiny(trial)):
            settings = dict(each.settings)
            if each.script == "peft_side.py":
                found = vars(peft_side.parse(accelerator.peft_arguments(settings)))
                assert found.items() >= {**settings, "shape": found["shape"]}.items()
                continue
            measure = card_run.measure
            if each.script == "card_measures.py":
                measure = card_measures.MEASURES[settings.pop("measure")]
            else:
                settings["folder"] = "."
            inspect.signature(measure).bind(**settings)


def test_the_steps_are_those_of_the_shipped_configs(accelerator):
    import card_job

    for name, file in (("full", pretrain_1b), ("lora", finetune_8b)):
        config = from_config_dict(file.get_config())
        assert config.trainable == name
        assert dataclasses.asdict(config.optim) == dataclasses.asdict(
            card_job.OPTIM[name]
        )
        assert config.model.loss_chunk == ModelConfig().loss_chunk


def read_results(out, finished):
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def run_tiny(out, *flags, **options):
    command = [sys.executable, BENCH / "accelerator.py", "--tiny", "--budget=1200"]
    command += [f"--out={out}", *flags]
    return read_results(
        out, subprocess.run(command, capture_output=True, text=True, **options)
    )


def split_trials(accelerator):
    """Trials of `card_measures.py`, and those of them that can be traced right here.

    Those are only traced when tiny, and have the flags of all others.
    """
    found = {True: [], False: []}
    for trial in accelerator.TRIALS:
        if trial.script == "card_measures.py":
            runs = accelerator.tiny(trial).settings.get("run", True)
            found[not (runs or trial.flags or trial.compiler)].append(trial)
    return found[False], found[True]


def test_steps_without_flags_are_traced_with_tiny_sizes(accelerator):
    import card_measures

    _, traced = split_trials(accelerator)
    assert {"pretrain", "lora", "lora-nf4"} < {trial.name for trial in traced}
    for trial in traced:
        settings = dict(accelerator.tiny(trial).settings)
        assert settings.pop("measure") == "step"
        [found] = card_measures.step(**settings)
        assert found["equations"] > 100, trial


def test_the_whole_script_runs_with_tiny_sizes(accelerator, tmp_path):
    """All other trials but `train`, with every flag: no typo costs minutes later."""
    ours, _ = split_trials(accelerator)
    names = ",".join(trial.name for trial in ours)
    single = {"JAX_NUM_CPU_DEVICES": "1"}
    single["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Halves the time to compile; results are compared, and speed is not.
    single["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    results = run_tiny(
        tmp_path / "card.jsonl", "--forks", f"--only={names}", env=os.environ | single
    )
    for trial in ours:
        found = [r for r in results if r["trial"] == trial.name]
        assert found and not any({"failed", "not_run"} & {*r} for r in found), found
        for result in found:
            assert result.get("flags", "") == trial.flags
            assert result.get("compiler", []) == [*trial.compiler]
    exact = {r["case"]: r["exact"] for r in results if "exact" in r}
    assert exact == {"no flag": True}
    steps = [r for r in results if r["settings"]["measure"] == "step"]
    traced = [r for r in steps if r["trial"] != "pretrain-scanned"]
    assert {"pretrain-deterministic"} < {r["trial"] for r in traced}
    assert all(r["equations"] > 100 for r in traced)
    assert [r["positions"] for r in steps if "positions" in r] == [4 * 31]
    kernels = [r for r in results if r["trial"] == "kernels"]
    done = [r for r in kernels if "not_here" not in r]
    assert [r.get("kernel", r.get("decoding")) for r in done] == [
        "xla",
        "xla",
        "blocks",
    ]
    assert all(r["right"] for r in done)
    refused = {r["not_here"] for r in kernels if "not_here" in r}
    gpu = "it needs an NVIDIA GPU, this is cpu"
    assert refused == {gpu, "it needs a TPU, this is cpu"}


def test_a_flag_that_xla_does_not_know_is_found_without_a_card(accelerator, tmp_path):
    """As the run above would find it in a trial that is traced alone."""
    also = 'lora:{"flags": "--xla_gpu_no_such_flag=true"}'
    command = [sys.executable, BENCH / "accelerator.py", "--tiny", "--forks"]
    command += ["--only=device", f"--also={also}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "xla_gpu_no_such_flag" in done.stdout


@pytest.mark.soak
def test_processes_of_their_own_and_whole_runs_with_tiny_sizes(tmp_path):
    results = run_tiny(tmp_path / "card.jsonl", "--only=device,lora,resume,train")
    assert {r["trial"] for r in results} == {"device", "lora", "resume", "train"}
    exact = [r["exact"] for r in results if "exact" in r]
    assert exact == [True, True, True]
