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
