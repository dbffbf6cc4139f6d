"""The actions between steps: with and without held-out rows."""

import contextlib
import types

import pytest

from research.config.run_config import CheckpointConfig, Config, EvalConfig
from research.runs.control.request_files import CHECKPOINT
from research.runs.phase_timer import PhaseTimer
from research.train import fit_runs, training_loop
from research.train.metrics import throughput


@pytest.mark.parametrize("every, expected", [(0, 30), (4, 4)])
def test_without_held_out_rows_nothing_is_evaluated(monkeypatch, every, expected):
    one_pass = object.__new__(fit_runs._TrainingPass)
    one_pass._config = Config(
        steps=30, eval=EvalConfig(every=every), checkpoint=CheckpointConfig(every=7)
    )
    one_pass._runs, one_pass._first = [], 0
    one_pass._program = types.SimpleNamespace(
        to_devices=None, make_eval_step=lambda: None, keep=None
    )

    def due(batches):
        monkeypatch.setattr(fit_runs, "held_out_batches", lambda *_: batches)
        return [(each.phase, each.every) for each in one_pass._actions()]

    assert due([]) == [("save", 7), ("sample", 30)]
    assert due(["batch"]) == [
        ("evaluate", expected), ("save", 7), ("save", expected), ("sample", 30),
    ]  # fmt: skip


@pytest.mark.parametrize(("best_by", "expected"), [("loss", 4), ("rouge_l", 5)])
def test_steps_are_saved_for_the_best_when_that_is_measured(
    monkeypatch, best_by, expected
):
    one_pass = object.__new__(fit_runs._TrainingPass)
    one_pass._config = Config(
        steps=30,
        eval=EvalConfig(every=4, answers_every=5),
        checkpoint=CheckpointConfig(every=7, best_by=best_by),
    )
    judged = types.SimpleNamespace(metrics={"rouge_l": None})
    one_pass._runs, one_pass._first = [types.SimpleNamespace(answers=judged)], 1
    one_pass._has_new_data = False
    one_pass._program = types.SimpleNamespace(
        to_devices=None, make_eval_step=lambda: None
    )
    monkeypatch.setattr(fit_runs, "held_out_batches", lambda *_: ["batch"])
    assert [(each.phase, each.every) for each in one_pass._actions()] == [
        ("evaluate", 4), ("evaluate", 5), ("save", 7), ("save", expected),
        ("sample", 30),
    ]  # fmt: skip
    judged.metrics = {}  # No row can be judged.
    assert ("evaluate", 5) not in {(x.phase, x.every) for x in one_pass._actions()}


def events_of(*, first=0, total=2, ending=False, requested=(), waits=False):
    """The acts of the loop, in order, with an action that keeps what it needs.

    `waits`: a step is over when the call that dispatches it returns.
    """
    events, resumed, asked = [], [], [frozenset(requested)]

    def update(state, batch):
        events.append(f"step from {state}")
        return state + 1, f"metrics of {state + 1}"

    @contextlib.contextmanager
    def beside(metrics):
        events.append(f"waits for {metrics}")
        yield

    training_loop.run(
        state=first,
        first=first,
        total=total,
        batches=type("Feed", (), {"number": 0, "__next__": lambda _: "batch"})(),
        step_fn=update,
        actions=[
            training_loop.Action(
                "evaluate",
                100,
                lambda step, state: events.append(f"evaluates {state} at {step}"),
                at_start=True,
                keep=lambda state: f"kept {state}",
            )
        ],
        log=lambda step, *_: events.append(f"logs {step}"),
        resume_clock=lambda: resumed.append(len(events)),
        stop=types.SimpleNamespace(is_due=lambda: ending),
        requests=types.SimpleNamespace(
            agreed=lambda: asked.pop() if asked else frozenset(),
            answer=lambda step: events.append(f"answers at {step}"),
        ),
        phases=PhaseTimer(),
        beside=beside,
        at_once=waits,
    )
    if "step from 0" in events:  # The clock starts again just before it.
        assert resumed == [events.index("step from 0")]
    return events


def test_the_first_step_goes_before_what_keeps_the_state_at_the_start():
    assert events_of() == [
        "step from 0", "waits for metrics of 1", "evaluates kept 0 at 0",
        "step from 1", "logs 1", "logs 2", "evaluates 2 at 2",
    ]  # fmt: skip


def test_a_step_that_is_over_is_logged_before_the_next_one_begins():
    """Else the time of the next one would count as its own."""
    assert events_of(waits=True) == [
        "step from 0", "waits for metrics of 1", "evaluates kept 0 at 0", "logs 1",
        "step from 1", "logs 2", "evaluates 2 at 2",
    ]  # fmt: skip


@pytest.mark.parametrize("without", [{"ending": True}, {"first": 2}])
def test_an_action_at_the_start_runs_at_once_where_no_step_follows(without):
    first = without.get("first", 0)
    assert events_of(**without) == [f"evaluates {first} at {first}"]


def test_a_checkpoint_that_is_asked_for_at_the_start_has_its_loss():
    assert events_of(requested=[CHECKPOINT]) == [
        "evaluates 0 at 0", "answers at 0", "step from 0",
        "step from 1", "logs 1", "logs 2", "evaluates 2 at 2",
    ]  # fmt: skip


def test_time_while_the_clock_is_stopped_is_no_part_of_a_step(monkeypatch):
    now = iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    clock = throughput.Clock()
    with clock.stopped():
        pass
    clock.tick()
    assert (clock.last, clock.elapsed) == (7.0, 7.0)
