"""A real Slurm: what is preempted is queued again and ends exactly; nothing else is."""

import dataclasses
import re

import pytest
import slurm_cluster
from pretraining_runs import STEP_LINE, make_corpus
from process_pairs import PLAIN
from run_results import check_equal, history
from slurm_cluster import Cluster

from research.core.errors import UserError

ABSENT = slurm_cluster.missing()
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        bool(ABSENT),
        reason=f"{', '.join(ABSENT)} not here: install {slurm_cluster.PACKAGES}",
    ),
]

STEPS = 36
LATER = STEP_LINE.replace("12", str(STEPS))
TRAINING = (
    "--config=pretrain.py", *PLAIN, f"--config.steps={STEPS}",
    "--config.eval.every=18", f"--config.eval.samples_every={STEPS}",
    "--config.eval.text_prompts=('def ',)", "--config.checkpoint.every=50",
    "--config.runtime.watchdog_s=60",
)  # fmt: skip
# `python -m launch` submits one run; several are an array.
SUBMIT = f"""
import sys
from pathlib import Path
from launch.__main__ import make_parser
from launch.jobs.launch_job import LaunchJob
from launch.targets import slurm
from research.config.run_config import Config
jobs = []
for name, *flags in (
    ("alone",), ("stopped",), ("cancelled",), ("wrong", "--config.text.sources=absent")
):
    where = Path("runs", name)
    flags = (*{TRAINING}, f"--config.run_dir={{where}}", *flags)
    jobs.append(LaunchJob(name, flags, Config(), beside=where))
options = make_parser().parse_args(["slurm"])
sys.exit(slurm.run(slurm.plan(jobs, options), options))
"""


@dataclasses.dataclass
class Little:
    """The cluster, and the folder its jobs run in."""

    cluster: Cluster
    place: object

    def submit(self, *arguments):
        """Returns the number of the job."""
        running = self.place.start_python(*arguments, more=self.cluster.env)
        done = running.finish()
        assert done.code == 0, done.err
        return re.search(r"Submitted batch job (\d+)", done.out)[1]

    def train(self, name, *flags):
        """Two processes, one a node."""
        where = f"--config.run_dir=runs/{name}"
        return self.submit(
            "-m", "launch", "slurm", "--nodes=2", "--", *TRAINING,
            "--config.mesh.fsdp=2", where, *flags,
        )  # fmt: skip

    def said(self, log):
        file = self.place.folder / "runs" / f"{log}.log"
        return file.read_text() if file.exists() else ""

    def wait_for_step(self, log, step):
        line = re.compile(LATER.format(step), re.M)
        self.cluster.wait_until(lambda: line.search(self.said(log)))


@pytest.fixture(scope="module")
def little(tmp_path_factory, place):
    make_corpus(place)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        print(cluster.call("scontrol", "--version"))
        yield Little(cluster, place)
    assert cluster.processes() == []


def causes(place, run):
    return [start["cause"].split()[0] for start in history(place, run)["starts"]]


def test_two_processes_preempted_twice_end_as_the_unbroken_two(little, place):
    """As before the time limit, and as an administrator does it."""
    ended = little.cluster.wait_until_over(little.train("whole"))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), ended
    number = little.train("100%j")
    little.wait_for_step("100%j.slurm", 4)
    little.cluster.call("scancel", "--signal=TERM", number)
    little.wait_for_step("100%j.slurm", 20)
    little.cluster.call("scontrol", "requeue", number)
    ended = little.cluster.wait_until_over(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), ended
    assert causes(place, "100%j") == ["SIGTERM", "SIGTERM", "done"]
    check_equal(place, "100%j", "whole")


def test_of_an_array_only_what_was_preempted_is_queued_again(little, place):
    """Slurm gives one of an array the number of all of it: the last to start."""
    number = little.submit("-c", SUBMIT)
    alone, stopped, cancelled, wrong = (f"{number}_{index}" for index in range(4))
    little.wait_for_step(f"slurm-array.slurm.{number}.2", 4)
    little.cluster.call("scancel", cancelled)
    little.wait_for_step(f"slurm-array.slurm.{number}.1", 4)
    little.cluster.call("scancel", "--signal=TERM", stopped)
    ended = {
        each: little.cluster.wait_until_over(each)
        for each in (alone, stopped, cancelled, wrong)
    }
    states = [(x["JobState"], x["Restarts"]) for x in ended.values()]
    assert states == [
        ("COMPLETED", "0"), ("COMPLETED", "1"), ("CANCELLED", "0"), ("FAILED", "0")
    ]  # fmt: skip
    assert ended[wrong]["ExitCode"] == f"{UserError.exit_code}:0"
    assert "absent" in little.said(f"slurm-array.slurm.{number}.3")
    assert causes(place, "cancelled") == ["SIGTERM"]
    check_equal(place, "stopped", "alone")
