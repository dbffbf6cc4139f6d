"""The actions between steps: with and without held-out rows."""

import types

import pytest

from research.config.run_config import CheckpointConfig, Config, EvalConfig
from research.train import fit_runs


@pytest.mark.parametrize("every, expected", [(0, 30), (4, 4)])
def test_without_held_out_rows_nothing_is_evaluated(monkeypatch, every, expected):
    one_pass = object.__new__(fit_runs._TrainingPass)
    one_pass._config = Config(
        steps=30, eval=EvalConfig(every=every), checkpoint=CheckpointConfig(every=7)
    )
    one_pass._runs, one_pass._first = [], 0
    one_pass._program = types.SimpleNamespace(
        to_devices=None, make_eval_step=lambda: None
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
