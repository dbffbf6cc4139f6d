"""A Slurm launch does what its dry run prints; no name given can make it do more."""

import argparse
import os
import subprocess

import pytest
from fake_tools import NASTY, ROOT, files, launch
from shell import SHELLCHECK, check

from launch.jobs import restart_policy
from launch.jobs.launch_job import LaunchJob
from launch.targets import slurm
from research.config.run_config import Config
from research.core.errors import PREEMPTED, STUCK

CONFIG = f"--config={ROOT}/configs/finetune_dolly.py"


@pytest.mark.parametrize("target", ["local", "slurm"])
def test_a_dry_run_shows_and_does_nothing(tmp_path, fake, target):
    fake("sbatch")
    before = files(tmp_path)
    done = launch(tmp_path, target, "--dry-run", "--", CONFIG, "--config.steps=3")
    assert done.returncode == 0, done.stderr
    assert f"-m research.train {CONFIG} --config.steps=3" in done.stdout
    assert ("asks for no GPU" in done.stderr) == (target == "slurm")
    assert files(tmp_path) == before and not (tmp_path / "calls").exists()


GPUS = {
    (): True,
    ("--sbatch=--cpus-per-task=8",): True,
    ("--gpus-per-node=0",): False,
    ("--gpus-per-node=4",): False,
    ("--sbatch=--gres=gpu:h100:4",): False,
    ("--sbatch=--gpus=16",): False,
    ("--sbatch=-G 4",): False,
}


@pytest.mark.parametrize("own", GPUS)
def test_a_job_without_gpus_is_warned_about_unless_it_is_meant(own):
    parser = argparse.ArgumentParser()
    slurm.add_flags(parser)
    config = Config(run_dir="runs/a")
    job = LaunchJob.of_run(["--config=c.py"], config)
    notes = slurm.plan([job], parser.parse_args(own)).notes
    assert ["--gpus-per-node=N" in note for note in notes] == [True] * GPUS[own]


@pytest.mark.parametrize("name", [*NASTY, "x\ntouch canary"])
def test_no_name_breaks_out_of_a_slurm_script(tmp_path, fake, name):
    """The script runs for real, with an `srun` that writes down what reaches it."""
    for tool in ("sbatch", "srun", "scontrol", "squeue"):
        fake(tool)
    run_dir = f"--config.run_dir=runs/{name}"
    own = ("--nodes=2", f"--name={name}", f"--sbatch=--comment={name}")
    done = launch(tmp_path, "slurm", *own, "--", CONFIG, run_dir)
    assert done.returncode == 0, done.stderr
    (submitted,) = fake.calls()
    assert {f"--job-name={name}", f"--comment={name}"} <= set(submitted)
    subprocess.run(["bash", submitted[-1]], cwd=tmp_path, check=True)
    (srun,) = (call for call in fake.calls() if call[0].endswith("srun"))
    assert run_dir in srun and "--config.runtime.distributed=true" in srun
    assert not list(tmp_path.rglob("canary"))


@SHELLCHECK
def test_the_slurm_script_is_clean(tmp_path):
    done = launch(tmp_path, "slurm", "--dry-run", "--", CONFIG)
    check(done.stdout[done.stdout.index("#!/bin/bash") : done.stdout.index("sbatch")])


def slurm_script(tmp_path, *codes, first="", **more):
    """Runs the script with an `srun` that ends so, and so; returns its own code."""
    launch(tmp_path, "slurm", "--", CONFIG, "--config.run_dir=runs/a")
    (tmp_path / "codes").write_text(" ".join(map(str, codes)))
    (tmp_path / "bin/srun").write_text(f"#!/bin/sh\n{first}{SRUN}")
    (tmp_path / "bin/srun").chmod(0o755)
    script = tmp_path / "runs/a.slurm.sh"
    env = os.environ | {"SLURM_JOB_ID": "17"} | more
    done = subprocess.run(["bash", script], cwd=tmp_path, env=env, check=False)
    return done.returncode


# The remaining codes stand in a file; each start takes the next one.
SRUN = """read code rest < codes
echo "$rest" > codes
exit "$code"
"""
# As Slurm does when it ends a job: the shell is told, too.
SIGNALLED = "kill -TERM $PPID\n"


@pytest.mark.parametrize(
    "code, state, requeued",
    [
        (0, "RUNNING None", False),
        (PREEMPTED, "RUNNING None", True),
        (PREEMPTED, "COMPLETING TimeLimit", True),
        (PREEMPTED, "COMPLETING None", False),  # scancel
        (PREEMPTED, "", False),
        (2, "RUNNING None", False),
        (3, "COMPLETING TimeLimit", False),
    ],
)
def test_slurm_queues_again_what_was_preempted_and_nothing_else(
    tmp_path, fake, code, state, requeued
):
    for tool in ("sbatch", "scontrol"):
        fake(tool)
    says(tmp_path, "squeue", state)
    assert slurm_script(tmp_path, code, first=SIGNALLED) == code
    asked = [call[1:] for call in fake.calls() if call[0].endswith("scontrol")]
    assert asked == ([["requeue", "17"]] if requeued else [])


@pytest.mark.parametrize(
    "codes, left",
    [
        ((1, 134, 0, 0), "0"),
        ((STUCK, 137, 1, 1, 0), "0"),
        *(((code, 0), "0") for code in (0, 2, 3, 4, 5, 130)),
    ],
)
def test_slurm_starts_again_what_failed_three_times(tmp_path, fake, codes, left):
    """In the same job: a failure that a person must fix is not tried again."""
    for tool in ("sbatch", "squeue"):
        fake(tool)
    wanted = codes[-2]
    assert slurm_script(tmp_path, *codes) == wanted
    assert (tmp_path / "codes").read_text().split() == [left]


def says(tmp_path, tool, text):
    path = tmp_path / "bin" / tool
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)


def test_slurm_queues_again_one_of_an_array_by_both_its_numbers(tmp_path, fake):
    """The array's number is also the job's of the last that started."""
    for tool in ("sbatch", "scontrol"):
        fake(tool)
    says(tmp_path, "squeue", "RUNNING None")
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0"}
    assert slurm_script(tmp_path, PREEMPTED, **array) == PREEMPTED
    assert fake.calls()[-1][1:] == ["requeue", "17_0"]


def test_slurm_signals_the_trainers_and_puts_nothing_into_a_name(tmp_path, fake):
    fake("sbatch")
    launch(tmp_path, "slurm", "--", CONFIG, "--config.run_dir=runs/100%j")
    (submitted,) = fake.calls()
    # srun, told to end by a shell that was signalled (`B:`), kills the trainers.
    assert "--signal=TERM@120" in submitted
    assert "--output=runs/100%%j.slurm.log" in submitted
    assert submitted[-1] == "runs/100%j.slurm.sh"


BAD = {
    "unknown target": (("locl", "--", CONFIG), "'locl'"),
    "missing tool": (("slurm", "--", CONFIG), "slurm-client"),
    "no trainer": (("local",), "--config=FILE.py"),
    "mistyped knob": (("local", "--", CONFIG, "--config.lora.rnak=3"), "lora.rank"),
    "missing config": (("local", "--", "--config=absent.py"), "absent.py"),
    "mistyped flag": (("slurm", "--noodles=2", "--", CONFIG), "--noodles"),
    "backslash": (("slurm", "--", CONFIG, r"--config.run_dir=a\b"), "backslash"),
    "no process": (
        ("local", "--processes=0", "--", CONFIG),
        "--processes: 0 is below 1",
    ),
}


@pytest.mark.parametrize("arguments, said", BAD.values(), ids=list(BAD))
def test_bad_input_is_one_line_and_nothing_is_made(
    tmp_path, fake, monkeypatch, arguments, said
):
    monkeypatch.setenv("PATH", str(fake.folder))  # Slurm may be on this machine.
    before = files(tmp_path)
    done = launch(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert files(tmp_path) == before


def test_what_a_person_must_mend_is_not_tried_again():
    assert not any(restart_policy.again(code, 3) for code in (0, 2, 3, 4, 5, 130))
    assert restart_policy.again(PREEMPTED, 0)
    for code in (1, -9, 137, STUCK):
        assert restart_policy.again(code, 1) and not restart_policy.again(code, 0)


def test_of_several_ends_the_one_that_failed_is_told():
    assert restart_policy.worst([0, 0]) == 0
    assert restart_policy.worst([PREEMPTED, PREEMPTED]) == PREEMPTED
    assert restart_policy.worst([PREEMPTED, -9]) == -9
    assert restart_policy.worst([STUCK, 4]) == 4
