"""Requests to a running job: answered once, at one step, by one process or by two."""

import json
import sys

import pytest
from commands import STEPS, chain, step_line

from research.core.errors import STOPPED, UserError
from research.runs.steering.control_requests import (
    KINDS,
    pending,
    withdraw,
    write_request,
)
from research.runs.steering.request_listener import RequestListener

# Three commands fit between the first steps and the last one.
SLOW = """
import time
from research.train.programs import device_batches
pull = device_batches.DeviceBatches.__next__
def pull_late(self):
    time.sleep(1.0)
    return pull(self)
device_batches.DeviceBatches.__next__ = pull_late
"""


def ask(place, run, kind, *flags):
    return place.run("control", kind, f"--run=runs/{run}", *flags)


def steer(place, run, start):
    """Asks for a save, a sample and the end while a job trains; then lets it resume."""
    running = start(programs=dict.fromkeys((0, 1), SLOW))
    running[0].wait_for(step_line(2))
    answers = [ask(place, run, kind) for kind in ("checkpoint", "sample", "stop")]
    stopped = [process.finish() for process in running]
    saved = place.saved_steps(run)
    return answers, stopped, saved, [process.finish() for process in start()]


@chain
def steered(place, results):
    results("unbroken")

    def start(programs=None):
        program = (programs or {}).get(0)
        return [place.start("train", *place.train_flags("steered"), program=program)]

    return steer(place, "steered", start)


@chain
def steered_pair(place, results):
    results("unbroken")

    def start(programs=None):
        flags = place.train_flags("steered-pair")
        return place.start_together(2, *flags, programs=programs)

    return steer(place, "steered-pair", start)


@pytest.mark.parametrize("run", ["steered", "steered-pair"])
def test_a_job_saves_samples_and_stops_on_request(place, request, run):
    answers, stopped, saved, resumed = request.getfixturevalue(run.replace("-", "_"))
    for kind, answer in zip(("checkpoint", "sample", "stop"), answers, strict=True):
        assert answer.code == 0, answer.err
        assert answer.out.startswith(f"{kind}: done, after step ")
    assert [process.code for process in stopped] == [STOPPED] * len(stopped)
    history = json.loads((place.run_dir(run) / "run.json").read_text())
    steps = {answer["kind"]: answer["step"] for answer in history["requests"]}
    assert list(steps) == ["checkpoint", "sample", "stop"]
    assert 2 <= steps["checkpoint"] <= steps["sample"] <= steps["stop"] < STEPS
    assert {steps["checkpoint"], steps["stop"]} & set(saved)
    assert saved[-1] == steps["stop"]
    assert history["starts"][0]["cause"] == f"stop request after step {steps['stop']}"
    assert history["starts"][0]["exit_code"] == STOPPED
    assert not list((place.run_dir(run) / "requests").iterdir())
    lines = (place.run_dir(run) / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {steps["sample"]}
    assert [process.code for process in resumed] == [0] * len(stopped)
    trained = [line["step"] for line in place.lines(run, "train")]
    assert trained == [*range(1, STEPS + 1)]


def test_a_stop_changes_no_loss(place, steered, unbroken):
    mine, theirs = (place.lines(run, "train") for run in ("steered", "unbroken"))
    assert [x["loss"] for x in mine] == [x["loss"] for x in theirs]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stop", "--run=runs/unbroken"), "no job trains in"),
        (("halt", "--run=runs/unbroken"), "'halt'"),
        (("stop",), "give a run directory"),
        (("stop", "--run=runs"), "not a run directory"),
    ],
)
def test_a_request_that_nobody_would_answer_is_refused(
    place, unbroken, arguments, said
):
    done = place.run("control", *arguments)
    assert done.code == 2 and said in done.err
    assert not (place.run_dir("unbroken") / "requests").exists()


class Alone:
    """A run of one process whose answers are kept in a list."""

    def __init__(self, folder):
        self.answers = []
        self.listener = RequestListener({folder: self.answers.append}, mesh=None)
        self.listener._looked = -sys.maxsize


def test_requests_are_answered_once_and_in_the_order_they_came(tmp_path):
    run = Alone(tmp_path)
    names = [write_request(tmp_path, kind) for kind in KINDS]
    assert [request.id for request in pending(tmp_path)] == names
    assert run.listener.agreed() == set(KINDS)
    run.listener.answer(5)
    assert [(a["id"], a["step"]) for a in run.answers] == [(n, 5) for n in names]
    assert not pending(tmp_path)
    run.listener._looked = -sys.maxsize
    assert run.listener.agreed() == frozenset()


def test_a_request_of_an_earlier_start_is_dropped_and_so_is_one_at_the_end(tmp_path):
    write_request(tmp_path, "stop")
    run = Alone(tmp_path)
    assert run.listener.agreed() == frozenset()
    with run.listener:
        write_request(tmp_path, "sample")
    told = [(answer["kind"], answer["answer"]) for answer in run.answers]
    assert told == [
        ("stop", "dropped: it was made before this start"),
        ("sample", "dropped: the run has ended"),
    ]
    assert [answer["step"] for answer in run.answers] == [None, None]


def test_files_that_are_no_requests_are_ignored(tmp_path):
    (tmp_path / "requests").mkdir()
    for name, text in {
        "stop-1": "{",
        "stop-2": "[]",
        "nap-3": '{"kind": "nap"}',
    }.items():
        (tmp_path / "requests" / f"{name}.json").write_text(text)
    assert pending(tmp_path) == []
    name = write_request(tmp_path, "stop")
    assert withdraw(tmp_path, name) and not withdraw(tmp_path, name)
    with pytest.raises(UserError, match="did you mean 'stop'"):
        write_request(tmp_path, "stopp")
