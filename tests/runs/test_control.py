"""Requests to a running job: answered once, at one step, by one process or by two."""

import json
import os
import sys
import types

import pytest
from commands import STEPS, chain, step_line
from doors import run_door
from kills import WAITS_FOR_REQUESTS, ask
from pretraining_runs import PRETRAIN_STEPS
from run_results import check_equal, history

from research.core.errors import STOPPED, UserError
from research.runs.__main__ import main
from research.runs.control.request_files import (
    KINDS,
    answer_to,
    pending,
    withdraw,
    write_request,
)
from research.runs.control.request_listener import RequestListener
from research.runs.phase_timer import PhaseTimer
from research.runs.run_history import History

HISTORY = {
    "starts": [], "events": [], "saved": 0, "skipped_batches": [], "accepted": {}
}  # fmt: skip
KINDS_MADE = ("checkpoint", "sample", "stop")


@chain
def steered(place, results):
    results("unbroken")
    program = WAITS_FOR_REQUESTS.format(run="steered")
    flags = place.train_flags("steered")
    running = place.start("train", *flags, program=program)
    running.wait_for(step_line(1))
    answers = ask(place, "steered", *KINDS_MADE)
    stopped = [running.finish()]
    saved = place.saved_steps("steered")
    launched = place.train("steered")
    return types.SimpleNamespace(
        answers=answers, stopped=stopped, saved=saved, launched=launched
    )


def check_answers(place, run, answers, kinds):
    """All were done and are in the history; returns the step of each."""
    for kind, answer in zip(kinds, answers, strict=True):
        assert answer.code == 0, answer.err
        assert answer.out.startswith(f"{kind}: done, after step ")
    steps = {x["kind"]: x["step"] for x in history(place, run)["requests"]}
    assert tuple(steps) == kinds
    assert not list((place.run_dir(run) / "requests").iterdir())
    lines = (place.run_dir(run) / "samples.jsonl").read_text().splitlines()
    assert steps["sample"] in {json.loads(line)["step"] for line in lines}
    assert 2 <= steps["checkpoint"] <= steps["sample"]
    return steps


def check_stop(place, run, found, last):
    """It was saved, sampled and stopped, and resumed up to the step `last`."""
    steps = check_answers(place, run, found.answers, KINDS_MADE)
    assert {process.code for process in found.stopped} == {STOPPED}
    assert steps["sample"] <= steps["stop"] < last
    assert found.saved[-1] == steps["stop"]
    start = history(place, run)["starts"][0]
    assert start["cause"] == f"stop request after step {steps['stop']}"
    assert start["exit_code"] == STOPPED
    assert found.launched.code == 0, found.launched.err
    trained = [line["step"] for line in place.lines(run, "train")]
    assert trained == [*range(1, last + 1)]


def test_two_processes_save_sample_and_stop_at_one_step(place, two_processes):
    check_stop(place, "two-processes", two_processes, PRETRAIN_STEPS)


@pytest.mark.soak
def test_one_process_saves_samples_and_stops(place, steered):
    check_stop(place, "steered", steered, STEPS)


def test_one_process_saves_and_samples_on_request(place, broken):
    steps = check_answers(place, "broken", broken.answers, KINDS_MADE[:2])
    assert steps["sample"] < STEPS


@pytest.mark.soak
def test_a_stop_changes_no_loss(place, steered, unbroken):
    check_equal(place, "steered", "unbroken")


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
    done = run_door(main, place.folder, "runs", *arguments)
    assert done.returncode == 2 and said in done.stderr
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
    fields = {"kind": "stop", "id": "1", "asked_at": "2026", "asked_by": "me"}
    odd = [
        *({**fields, name: value} for name in fields for value in (5, None, ["stop"])),
        *({k: v for k, v in fields.items() if k != name} for name in fields),
        *({**fields, "more": 1}, {**fields, "kind": "nap"}, [], "stop", 7),
    ]
    texts = [*map(json.dumps, odd), "{", "", "[" * 100_000, "\0"]
    for number, text in enumerate(texts):
        (tmp_path / "requests" / f"stop-{number}.json").write_text(text)
    (tmp_path / "requests" / "stop-folder.json").mkdir()
    os.mkfifo(tmp_path / "requests" / "stop-pipe.json")  # To read it would wait.
    assert pending(tmp_path) == []
    name = write_request(tmp_path, "stop")
    assert withdraw(tmp_path, name) and not withdraw(tmp_path, name)
    with pytest.raises(UserError, match="did you mean 'stop'"):
        write_request(tmp_path, "stopp")


ODD_ANSWERS = [5, None, {}, "stop", [5], [{}], [{"id": "a", "answer": "done"}]]


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_odd_answers_in_a_history_are_one_sentence_and_no_answer(tmp_path, odd):
    file = tmp_path / "run.json"
    good = {"id": "a", "answer": "done", "step": 3}
    file.write_text(json.dumps(HISTORY | {"requests": odd}))
    assert answer_to(file, "a") is None
    with pytest.raises(UserError, match=r"run\.json cannot be used \(it.*; restore a"):
        History(file, PhaseTimer())
    for text in (json.dumps([odd]), "{", "[" * 100_000):
        file.write_text(text)
        assert answer_to(file, "a") is None
    file.write_text(json.dumps({"requests": [odd, good]}))
    assert answer_to(file, "a") == good
    file.write_text(json.dumps(HISTORY | {"requests": [good]}))
    History(file, PhaseTimer()).answer_request(good | {"id": "b"})
    assert answer_to(file, "b")["step"] == 3
