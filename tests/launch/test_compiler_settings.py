"""Settings have a source each, and what may change a number is never on unasked."""

import argparse
import dataclasses
import os
import re
import subprocess
import sys

import pytest
from commands import ROOT

from launch.jobs import compiler_settings
from launch.jobs.launch_job import LaunchJob
from launch.targets import local, slurm
from research.config.run_config import Config
from research.core.errors import UserError
from research.parallel.chips import CHIPS
from research.plan import planner
from research.plan.compiled.libtpu_environment import ENVIRONMENT
from research.runs import provenance

ALL = compiler_settings.SETTINGS.values()
FILE = compiler_settings.FILE.read_text()


@pytest.mark.parametrize("setting", ALL, ids=compiler_settings.SETTINGS)
def test_what_is_set_is_kept_in_the_runs_history(setting):
    told = provenance.describe({setting.variable: setting.value})
    assert told["environment"] == {setting.variable: setting.value}


@pytest.mark.parametrize("setting", ALL, ids=compiler_settings.SETTINGS)
def test_each_says_what_it_is_and_where_that_stands(setting):
    assert setting.chips and set(setting.chips) <= CHIPS.keys()
    assert setting.does and setting.why
    sources = re.findall(r"^# (\w+) +https://\S+$", FILE, re.MULTILINE)
    named = [part.strip() for part in setting.source.split(";")]
    assert set(named) & set(sources), "no public address"
    if setting.variable in compiler_settings.OF_FLAGS:
        assert all(re.fullmatch(r"--\w+=\w+", f) for f in setting.value.split())
    of_tpu = {CHIPS[chip].platform for chip in setting.chips} == {"tpu"}
    assert (setting.variable == "LIBTPU_INIT_ARGS") <= of_tpu


@pytest.mark.parametrize("chip", [*CHIPS, ""])
def test_nothing_that_may_change_numbers_is_on_by_default(chip):
    found = compiler_settings.environment(chip, ["default"], {})
    text = " ".join(f"{k}={v}" for k, v in found.items())
    for setting in ALL:
        if setting.changes_numbers:
            assert not setting.by_default
            assert setting.value not in text
    assert bool(found) == (chip in CHIPS and CHIPS[chip].platform == "gpu")


def test_reductions_in_another_place_are_asked_for_by_name():
    assert compiler_settings.SETTINGS["tpu-sparsecore"].changes_numbers
    found = compiler_settings.environment("v6e", ["default", "tpu-sparsecore"], {})
    assert "sparse_core_collective_offload_all_reduce=true" in found["LIBTPU_INIT_ARGS"]


def test_no_flag_is_set_twice_by_settings_that_share_it():
    both = ["tpu-async-reduce", "tpu-async-gather"]
    flags = compiler_settings.environment("v5e", both, {})["LIBTPU_INIT_ARGS"].split()
    assert len(flags) == len(set(flags)) == 6


def test_jax_may_have_the_memory_that_a_plan_counts_on():
    found = compiler_settings.environment("h100", ["default"], {})
    assert float(found["XLA_CLIENT_MEM_FRACTION"]) == planner.USABLE


def test_what_the_user_has_set_stays_and_stands_last():
    own = {
        "XLA_FLAGS": "--xla_dump_to=x --xla_gpu_enable_latency_hiding_scheduler=false",
        "XLA_CLIENT_MEM_FRACTION": "0.5",
        "LIBTPU_INIT_ARGS": "--of_no_concern=1",
    }
    # All of it is the user's: nothing is left to set.
    assert compiler_settings.environment("h100", ["default"], own) == {}
    found = compiler_settings.environment("h100", ["default", "gpu-cublas"], own)
    ours = "--xla_gpu_enable_triton_gemm=false"
    assert found == {"XLA_FLAGS": f"{ours} {own['XLA_FLAGS']}"}


def test_jaxlibs_old_name_of_a_variable_is_the_users_choice_too():
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    found = compiler_settings.environment("h100", ["default"], own)
    assert "XLA_CLIENT_MEM_FRACTION" not in found


@pytest.mark.parametrize("asked", [["none"], [""], []])
def test_none_is_none(asked):
    assert compiler_settings.environment("h100", asked, {"XLA_FLAGS": "--x=1"}) == {}


def test_by_name_it_is_set_where_the_chip_is_not_known():
    assert compiler_settings.environment("", ["default"], {}) == {}
    found = compiler_settings.environment("", ["gpu-cublas"], {})
    assert found == {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}


BAD = {
    "mistyped": ("h100", ["gpu-cublass"], "did you mean 'gpu-cublas'"),
    "of another chip": ("h100", ["tpu-vmem"], "is for v6e, not for h100"),
    "refused by libtpu": ("v5p", ["tpu-async-gather"], "is for v5e, not for v5p"),
    "unknown chip": ("h10", ["default"], "did you mean 'h100'"),
    "none and more": ("h100", ["none", "gpu-cublas"], "use none alone"),
}


@pytest.mark.parametrize("chip, asked, said", BAD.values(), ids=BAD)
def test_what_cannot_be_set_is_named(chip, asked, said):
    with pytest.raises(UserError, match=said) as caught:
        compiler_settings.environment(chip, asked, {})
    assert "\n" not in str(caught.value)


def test_the_installed_jaxlib_knows_every_flag():
    """It ends the process at a flag it does not know, as a remote one would."""
    flags = [s.value for s in ALL if s.variable == "XLA_FLAGS"]
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.tpu
@pytest.mark.parametrize(
    "setting, chip",
    [(s, c) for s in ALL if s.variable == "LIBTPU_INIT_ARGS" for c in s.chips],
)
def test_libtpu_compiles_with_every_flag(setting, chip):
    program = f"""
import jax
from jax.experimental import topologies
slice_ = topologies.get_topology_desc("{chip}:{CHIPS[chip].shapes[2]}", "tpu")
where = jax.sharding.SingleDeviceSharding(slice_.devices[0])
x = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=where)
jax.jit(lambda x: x @ x).lower(x).compile()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": setting.value},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_list_shows_every_one():
    shown = subprocess.run(
        [sys.executable, "-m", "launch", "--settings=list"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for setting in ALL:
        assert setting.name in shown and setting.variable in shown
        assert all(flag in shown for flag in setting.value.split())
    lines = [x for x in shown.splitlines() if "https://" not in x]
    assert max(map(len, lines)) <= 88


NASTY = "--a=$(touch canary) 'b \"c\n"


@pytest.fixture
def job():
    made = LaunchJob.of_run(["--config=c.py"], Config(run_dir="runs/a"))
    return dataclasses.replace(made, env={"XLA_FLAGS": NASTY, "B": "2"})


def parse(target, *own):
    parser = argparse.ArgumentParser()
    target.add_flags(parser)
    return parser.parse_args(own)


@pytest.mark.parametrize("processes", [1, 2])
def test_local_processes_start_with_it(job, processes):
    plan = local.plan([job], parse(local, f"--processes={processes}"))
    assert len(plan.env) == len(plan.commands) == processes
    for env in plan.env:
        assert env.items() >= job.env.items()
        assert ("JAX_PROCESS_ID" in env) == (processes > 1)


def test_a_slurm_step_starts_with_it(job, tmp_path, monkeypatch):
    """The script runs for real; its `srun` shows what the trainer would get."""
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s" "$XLA_FLAGS" > flags\n')
    for tool in ("srun", "python"):
        (tmp_path / tool).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm.sys, "executable", str(tmp_path / "python"))
    plan = slurm.plan([job], parse(slurm))
    (script,) = plan.files.values()
    subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    assert (tmp_path / "flags").read_text() == NASTY
    assert not (tmp_path / "canary").exists()


def test_without_settings_the_command_is_as_it_was(job):
    bare = dataclasses.replace(job, env={})
    assert bare.setting_env(["a", "b"]) == ["a", "b"]
