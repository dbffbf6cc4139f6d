"""Programs that launches call, replaced by ones that write down what reaches them."""

import json
import os
import sys
from pathlib import Path

import pytest
from doors import run_door

from launch.__main__ import main, make_parser
from launch.jobs.launch_job import LaunchJob
from research.config.run_config import Config, DataConfig, ModelConfig, RuntimeConfig

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" * 6 + "c0de"
NASTY = (
    "a b",
    "it's",
    '"',
    "$(touch canary)",
    "`touch canary`",
    "a;touch canary",
    "x\ny",
)
FLAGS = {
    "tpu-vm": ("--zone=us-west4-a", "--bucket=shelf"),
    "gke": ("--image=registry/image:1", "--volume=claim:/shelf"),
    "skypilot": ("--bucket=gs://shelf",),
}
PROGRAM = """#!{python} -IS
import fcntl, json, os, sys, time
own = open(__file__)
fcntl.flock(own, fcntl.LOCK_EX)  # Several launches may call it at once.
with open({calls!r}, "a") as out:
    out.write(json.dumps(sys.argv) + "\\n")
answers = {answers!r}
rules = json.load(open(answers)) if os.path.exists(answers) else []
for rule in rules:
    if rule["times"] != 0 and rule["when"] in " ".join(sys.argv[1:]):
        if rule["times"]:
            rule["times"] -= 1
            json.dump(rules, open(answers, "w"))
        own.close()
        time.sleep(rule["wait"])
        sys.stdout.write(rule["out"])
        sys.stderr.write(rule["err"])
        sys.exit(rule["code"])
"""


class Fake:
    """`fake("sbatch")` puts a program on PATH that says nothing and ends with 0."""

    def __init__(self, folder):
        self.folder, self._calls = folder / "bin", folder / "calls"
        self.folder.mkdir()

    def __call__(self, tool):
        path = self.folder / tool
        text = PROGRAM.format(
            python=sys.executable,
            calls=str(self._calls),
            answers=str(self._answers(tool)),
        )
        path.write_text(text)
        path.chmod(0o755)

    def _answers(self, tool):
        return self.folder / f"{tool}.answers"

    def answer(self, tool, when, *, code=0, out="", err="", times=None, wait=0):
        """Set the answer to arguments with `when` in them: always, or so many times."""
        file = self._answers(tool)
        rules = json.loads(file.read_text()) if file.exists() else []
        rules.append({"when": when, "code": code, "out": out, "err": err})
        rules[-1] |= {"times": times, "wait": wait}
        file.write_text(json.dumps(rules))

    def git(self):
        """A clean checkout of the code at `COMMIT`, whatever is true."""
        self("git")
        self.answer("git", "--show-toplevel", out=f"{ROOT}\n")
        self.answer("git", "rev-parse HEAD", out=f"{COMMIT}\n")

    def calls(self):
        """argv of every call so far, the tool's path first."""
        if not self._calls.exists():
            return []
        return [json.loads(line) for line in self._calls.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = Fake(tmp_path)
    monkeypatch.setenv("PATH", f"{made.folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return made


def launch(folder, *arguments, check=False):
    """`check`: the planner is asked, too, which takes a second."""
    if "--" in arguments and not check:
        arguments = (arguments[0], "--no-fit-check", *arguments[1:])
    return run_door(main, folder, "launch", *arguments)


def options_of(target, *more):
    """Parse a launch with `FLAGS`, each replaced if `more` has it."""
    given = {flag.partition("=")[0] for flag in more}
    own = [x for x in FLAGS[target] if x.partition("=")[0] not in given]
    return make_parser().parse_args([target, *own, *more])


def files(folder):
    """All but what fakes leave."""
    found = folder.rglob("*")
    return {x.relative_to(folder) for x in found if x.name not in ("calls", "bin")} - {
        x.relative_to(folder) for x in (folder / "bin").rglob("*")
    }


@pytest.fixture
def cloud_job():
    """`cloud_job(name)`: for a TPU v5e:4x4, its run directory named by it."""

    def make(name, run_dir="", topology="v5e:4x4", rows="", slices=1, start="hub"):
        own = Config(
            run_dir=run_dir or f"runs/{name}",
            data=DataConfig(path=rows),
            model=ModelConfig(init_from=start),
            runtime=RuntimeConfig(topology=topology, slices=slices),
        )
        flags = (f"--config={ROOT}/configs/finetune_8b.py", f"--note={name}")
        return LaunchJob.of_run(flags, own, name)

    return make
