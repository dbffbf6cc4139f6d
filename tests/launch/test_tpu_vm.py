"""The script of a TPU VM runs here, and the launcher answers each way it can end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile

import pytest
from fake_tools import COMMIT, NASTY, ROOT, launch, options_of
from shell import SHELLCHECK, check
from waiting import PATIENCE, wait_until

from launch.clouds import rented_machines
from launch.targets import find
from research.core.errors import PREEMPTED, STUCK

TRAINER = """#!{python} -IS
import json, os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
with open("seen.json", "a") as out:
    own = {{k: os.environ.get(k) for k in ("RESEARCH_CODE_VERSION", "HF_TOKEN")}}
    out.write(json.dumps([sys.argv[1:], own]) + "\\n")
print("it trains", flush=True)
while {waits} and not told:
    time.sleep(0.02)
time.sleep(0.1 if told else 0)  # It saves.
print("it ends", flush=True)
sys.exit({code})
"""


class Worker:
    """A home directory as on a VM, with the script of a job."""

    def __init__(self, home, script):
        self.home = home
        (home / "research").mkdir(parents=True)
        (home / "research-env/bin").mkdir(parents=True)
        (home / "research.sh").write_text(script)

    def trainer(self, code, *, waits=False):
        python = self.home / "research-env/bin/python"
        text = TRAINER.format(python=sys.executable, code=code, waits=waits)
        python.write_text(text)
        python.chmod(0o755)

    def do(self, action):
        """As gcloud gives it to the shell there."""
        return subprocess.run(
            f"bash research.sh {action}", shell=True, cwd=self.home,
            env=os.environ | {"HOME": str(self.home)},
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    def seen(self):
        """Argv and environment of each trainer that was started."""
        file = self.home / "research/seen.json"
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"))
        return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def worker(tmp_path, fake, monkeypatch, cloud_job):
    """`worker(name, *flags)`: one of a job of that name, in a home with a space."""
    fake.git()
    monkeypatch.chdir(tmp_path)

    def make(name, *flags, home="a home"):
        plan = find("tpu-vm").plan([cloud_job(name)], options_of("tpu-vm", *flags))
        (script,) = plan.files.values()
        return Worker(tmp_path / home, script)

    return make


def test_no_name_breaks_out_of_the_script(tmp_path, worker):
    for index, name in enumerate(NASTY):
        vm = worker(name, home=f"home {index}")
        vm.trainer(0)
        assert vm.do("train").returncode == 0
        ((words, env),) = vm.seen()
        assert f"--note={name}" in words
        assert f"--config.run_dir=/mnt/research/runs/{name}" in words
        assert "--config.runtime.distributed=true" in words
        assert env["RESEARCH_CODE_VERSION"] == COMMIT
    vm.do("tail")
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("code", [0, STUCK])
def test_the_log_ends_with_the_trainers_exit_code(worker, code):
    vm = worker("a")
    vm.trainer(code)
    vm.do("train")
    told = vm.do("tail")
    assert told.returncode == code
    assert "it trains" in told.stdout and "it ends" in told.stdout


def test_a_trainer_is_started_once(worker):
    vm = worker("a")
    vm.trainer(0, waits=True)
    assert [vm.do("train").returncode for _ in range(3)] == [0, 0, 0]
    assert len(vm.seen()) == 1
    vm.do("stop")
    assert vm.do("tail").returncode == 0
    vm.trainer(0)
    vm.do("train")
    vm.do("tail")
    assert len(vm.seen()) == 2


@pytest.mark.parametrize("by_a_person", [True, False])
def test_a_stop_is_final_and_a_preemption_is_not(worker, by_a_person):
    """Both let it save; only what a person stopped is not started again."""
    vm = worker("a")
    vm.trainer(PREEMPTED, waits=True)
    vm.do("train")
    vm.seen()
    if by_a_person:
        vm.do("stop")
    else:
        os.kill(int((vm.home / "research.pid").read_text()), signal.SIGTERM)
    told = vm.do("tail")
    assert told.returncode == (130 if by_a_person else PREEMPTED)
    assert "it ends" in told.stdout


def test_secrets_are_read_there_and_written_nowhere(worker, fake):
    fake("gcloud")
    fake.answer("gcloud", "latest --secret=HF_TOKEN --project=a b", out="canary\n")
    vm = worker("a", "--secret=HF_TOKEN", "--project=a b")
    vm.trainer(0)
    vm.do("train")
    ((_, env),) = vm.seen()
    assert env["HF_TOKEN"] == "canary"
    assert "--project=a b" in fake.calls()[-1]
    (vm.home / "research/seen.json").unlink()
    vm.do("tail")
    kept = [x for x in vm.home.rglob("*") if x.is_file()]
    assert kept and not [x for x in kept if "canary" in x.read_text()]


def test_without_its_secret_nothing_trains(worker, fake):
    fake("gcloud")
    fake.answer("gcloud", "secrets", code=1, err="no permission")
    vm = worker("a", "--secret=HF_TOKEN")
    vm.trainer(0)
    vm.do("train")
    told = vm.do("tail")
    assert told.returncode == 2 and "no permission" in told.stdout
    assert not (vm.home / "research/seen.json").exists()


def test_code_is_unpacked_and_the_bucket_mounted(tmp_path, worker, fake):
    for tool in ("sudo", "gcsfuse", "mountpoint"):
        fake(tool)
    fake.answer("mountpoint", "", code=1)
    vm = worker("a", "--bucket=gs://it's")
    (vm.home / "research/stale.py").touch()
    (tmp_path / "launch/setup").mkdir(parents=True)
    (tmp_path / "launch/setup/install.sh").write_text(
        'printf "%s\\n" "$@" >installed\n'
    )
    with tarfile.open(vm.home / "research.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "launch", "launch")
    done = vm.do("install")
    assert done.returncode == 0, done.stderr
    assert not (vm.home / "research/stale.py").exists()
    installed = (vm.home / "installed").read_text().splitlines()
    assert installed == [f"{vm.home}/research-env", "jax[tpu]"]
    (mounted,) = [x for x in fake.calls() if x[0].endswith("gcsfuse")]
    assert mounted[-2:] == ["it's", "/mnt/research"]
    assert any(x.startswith("--rename-dir-limit=") for x in mounted)
    fake.answer("sudo", "", code=1)
    assert vm.do("install").returncode != 0  # And nothing after it was done.


@SHELLCHECK
def test_scripts_are_clean(worker):
    check((worker("a", "--secret=HF_TOKEN").home / "research.sh").read_text())
    for script in sorted((ROOT / "launch").glob("*.sh")):
        check(script.read_text())


@pytest.fixture
def cloud(tmp_path, fake, monkeypatch, cloud_job):
    """`cloud(*flags)` runs a launch with a fake gcloud; returns code and verbs."""
    fake.git()
    fake("gcloud")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rented_machines, "SETTLE", 0.0)
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {x: signal.getsignal(x) for x in taken}

    def run(*flags, names=("a",)):
        options = options_of("tpu-vm", *flags)
        target = find("tpu-vm")
        plan = target.plan([cloud_job(name) for name in names], options)
        code = target.run(plan, options)
        return code, [verb(x) for x in fake.calls() if x[0].endswith("gcloud")]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def verb(call):
    told = [x for x in call if x.startswith("--command=")]
    return told[0].split()[-1] if told else call[5]


READY = ("describe", {"out": "READY\n"})
PREPARE = ["describe", "scp", "scp", "install"]
MAKE = ["create", *PREPARE]
LIVES = {
    "done": ((), [READY], 0, [*MAKE, "train", "tail", "delete"]),
    "kept": (("--keep",), [READY], 0, [*MAKE, "train", "tail"]),
    "preempted twice": (
        ("--restarts=0",),
        [
            ("tail", {"code": 255, "times": 2}),
            ("describe", {"out": "READY\n", "times": 1}),
            ("describe", {"out": "PREEMPTED\n", "times": 1}),
            ("describe", {"out": "READY\n", "times": 1}),
            ("describe", {"code": 1, "err": "NOT_FOUND: gone", "times": 1}),
            READY,
        ],
        0,
        [*MAKE, "train", "tail", "describe", "delete", *MAKE, "train", "tail",
         "describe", *MAKE, "train", "tail", "delete"],
    ),
    "preempted before it trained": (
        ("--restarts=0",),
        [
            ("install", {"code": 1, "times": 1}),
            ("describe", {"out": "READY\n", "times": 1}),
            ("describe", {"out": "PREEMPTED\n", "times": 1}),
            READY,
        ],
        0,
        [*MAKE, "describe", "delete", *MAKE, "train", "tail", "delete"],
    ),
    "told to save": (
        ("--restarts=0",), [READY, ("tail", {"code": PREEMPTED, "times": 1})], 0,
        [*MAKE, "train", "tail", "describe", "train", "tail", "delete"],
    ),
    "a connection lost": (
        ("--restarts=0",), [READY, ("tail", {"code": 255, "times": 3})], 0,
        [*MAKE, *["train", "tail", "describe"] * 3, "train", "tail", "delete"],
    ),
    "a VM that never answers": (
        ("--restarts=1",), [READY, ("scp", {"code": 255})], 255,
        ["create", *["describe", "scp", "describe"] * 2, "delete"],
    ),
    "failing": (
        ("--restarts=1",), [READY, ("tail", {"code": 1})], 1,
        [*MAKE, *["train", "tail", "describe"] * 2, "delete"],
    ),
    "for a person to fix": (
        (), [READY, ("tail", {"code": 3})], 3, [*MAKE, "train", "tail", "delete"],
    ),
    "no room to make it again": (
        ("--restarts=0",),
        [
            ("tail", {"code": 255, "times": 1}),
            ("describe", {"out": "READY\n", "times": 1}),
            ("describe", {"code": 1, "err": "NOT_FOUND: gone", "times": 1}),
            READY,
            ("create", {"code": 0, "times": 1}),
            ("create", {"code": 1, "times": 2}),
        ],
        0,
        [*MAKE, "train", "tail", "describe", "create", "create", *MAKE, "train",
         "tail", "delete"],
    ),
    "a name that is taken": ((), [("create", {"code": 1})], 1, ["create"]),
    "no word from gcloud": (
        (),
        [("describe", {"out": "READY\n", "times": 1}),
         ("describe", {"code": 1, "err": "login"}), ("tail", {"code": 1})],
        1, [*MAKE, "train", "tail", "describe"],
    ),
    "waiting for chips": (
        ("--queued",),
        [("describe", {"out": "WAITING_FOR_RESOURCES\n", "times": 2}),
         ("describe", {"out": "ACTIVE\n"})],
        0, ["create", "describe", "describe", *PREPARE, "train", "tail", "delete"],
    ),
    "never ready": (
        ("--queued", "--restarts=1"), [("describe", {"out": "FAILED\n"})], 1,
        ["create", "describe", "describe", "delete"] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags, answers, code, verbs", LIVES.values(), ids=LIVES)
def test_a_vm_is_used_and_deleted(cloud, fake, flags, answers, code, verbs):
    for when, answer in answers:
        fake.answer("gcloud", when, **answer)
    assert cloud(*flags) == (code, verbs)


def test_a_vm_that_answers_no_more_is_not_rented_for_ever(cloud, fake, monkeypatch):
    monkeypatch.setattr(rented_machines, "SILENT", 2)
    fake.answer("gcloud", *READY[:1], **READY[1])
    fake.answer("gcloud", "tail", code=255)
    seen = [*MAKE, *["train", "tail", "describe"] * 3, "delete"]
    assert cloud("--restarts=0") == (255, seen)


def test_more_flags_go_to_the_making(cloud, fake):
    fake.answer("gcloud", "describe", out="READY\n")
    cloud("--create=--network=a b", "--create=--reserved")
    (made,) = [x for x in fake.calls() if "create" in x]
    assert {"--network=a b", "--reserved"} <= set(made)


def test_parts_can_be_done_apart(cloud, fake):
    parts = {
        "create": ["create", "describe"],
        "push": ["scp", "scp", "install"],
        "train": ["train"],
        "tail": ["tail"],
        "stop": ["stop"],
        "delete": ["delete"],
    }
    seen = []
    for do, verbs in parts.items():
        seen += verbs
        assert cloud(f"--do={do}") == (0, seen)
    fake.answer("gcloud", "tail", code=3)
    assert cloud("--do=tail")[0] == 3


def test_only_what_rents_is_planned(tmp_path, fake):
    """From the door: a VM must be deleted even if its config fits nothing."""
    fake("gcloud")
    fake.git()
    flags = ("--zone=z", "--bucket=b", "--type=v5litepod-4")
    config = f"--config={ROOT}/configs/pretrain_8b.py"

    def start(*more):
        return subprocess.run(
            [sys.executable, "-m", "launch", "tpu-vm", *flags, *more, "--", config],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=PATIENCE,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    refused = launch(tmp_path, "tpu-vm", *flags, "--", config, check=True)
    assert refused.returncode == 2 and "--no-fit-check" in refused.stderr
    assert not [x for x in fake.calls() if x[0].endswith("gcloud")]
    done = start("--do=delete")
    assert done.returncode == 0, done.stderr
    assert [verb(x) for x in fake.calls() if x[0].endswith("gcloud")] == ["delete"]


def test_each_job_has_a_vm_and_a_log(tmp_path, cloud, fake):
    fake.answer("gcloud", "describe", out="READY\n")
    fake.answer("gcloud", "a-b --worker=all --command=bash research.sh tail", code=5)
    fake.answer("gcloud", "tail", out="it trains\n")
    code, verbs = cloud(names=("a b", "c"))
    assert code == 5
    assert sorted(verbs) == sorted([*MAKE, "train", "tail", "delete"] * 2)
    assert "it trains" in (tmp_path / "runs/c.tpu-vm.log").read_text()
    packed = [x for x in fake.calls() if "archive" in x]
    assert len(packed) == 1  # The code is the same.


def test_a_launcher_that_is_interrupted_deletes_nothing(tmp_path, fake):
    fake.git()
    fake("gcloud")
    fake.answer("gcloud", "describe", out="READY\n")
    fake.answer("gcloud", "tail", wait=2 * PATIENCE)
    own = [sys.executable, "-m", "launch", "tpu-vm", "--zone=z", "--bucket=b"]
    own.append("--no-fit-check")
    config = f"--config={ROOT}/configs/finetune_8b.py"
    running = subprocess.Popen(
        [*own, "--", config], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # The fake is in its wait, or just before it.
    wait_until(lambda: "tail" in map(verb, (x for x in fake.calls() if len(x) > 5)))
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=PATIENCE)[1]
    assert running.returncode == 130
    assert "nothing was deleted" in said
    assert "delete" not in [verb(x) for x in fake.calls() if len(x) > 5]


def test_what_is_pasted_is_what_is_run(cloud, fake, cloud_job):
    """The text of a plan reads back as its commands."""
    plan = find("tpu-vm").plan(
        [cloud_job("a b")], options_of("tpu-vm", "--project=x y")
    )
    shown = plan.text()[plan.text().index("git -C") :]
    assert [shlex.split(x) for x in shown.splitlines() if x] == [
        list(x) for x in plan.commands
    ]
