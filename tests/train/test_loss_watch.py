"""A run that ends at a loss, or saves at a drop, does so at the same step resumed."""

import dataclasses
import gc
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import as_killed, make_small_place, small_config

from research.checkpoints.stored_steps import step_folders
from research.config.knob_groups import CheckpointConfig, EvalConfig, OptimConfig
from research.core.errors import UserError
from research.runs.metrics_file import MetricsFile, read_metrics
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.train import training_loop
from research.train.metrics.loss_watch import WINDOW, LossWatch, resumed_watch
from research.train.start_to_report import train
from research.train.together import compatibility

STEPS, EVERY, SAVE_EVERY = 60, 8, 25
LOSSES = 4 * np.exp(-np.arange(STEPS + 1) / 25) + np.sin(np.arange(STEPS + 1)) / 9
ROWS = "rows"  # The mark of the held-out rows.


class Part:
    """One start of a run: the real loop, watch and metrics file, and losses by list."""

    def __init__(self, folder, first, stop_at=STEPS, *, optim=0.0, evals=0.0, drop=0.0):
        self.optim = OptimConfig(stop_loss=optim)
        self.evals = EvalConfig(every=EVERY, stop_loss=evals)
        self.drop, self.saved, self.why = drop, [], ""
        self.file = MetricsFile(folder, first)
        checkpoint = CheckpointConfig(loss_drop=drop)
        self.watch = resumed_watch(
            folder, first, ROWS, self.optim, self.evals, checkpoint
        )
        batches = SimpleNamespace(number=first - 1)
        action = training_loop.Action
        polled = iter(range(first, STEPS + 1))
        _, self.done = training_loop.run(
            state=None,
            first=first,
            total=STEPS,
            batches=type("Feed", (), {"number": 0, "__next__": lambda _: batches})(),
            step_fn=lambda state, _: (None, None),
            actions=[
                action("evaluate", EVERY, self.evaluate, at_start=not first),
                action("save", SAVE_EVERY, self.save, wanted=self.watch.has_dropped),
            ],
            log=self.log,
            resume_clock=lambda: None,
            stop=SimpleNamespace(is_due=lambda: next(polled) == stop_at),
            phases=PhaseTimer(),
            requests=SimpleNamespace(agreed=frozenset, answer=None),
            ends=self.ends,
        )
        self.file.close()

    def log(self, number, batch, metrics):
        self.file.write(number, "train", line(number))
        self.watch.add(number, line(number)["loss"], self.drop)

    def evaluate(self, number, state):
        loss = LOSSES[number] + 1
        self.file.write(number, "eval", {"loss": loss, "data": ROWS})
        if number:
            self.watch.evaluated = loss

    def save(self, number, state):
        self.saved.append(number)

    def ends(self, step):
        self.why = self.watch.why_end(step, self.optim, self.evals)
        return bool(self.why)


def drops(part, optim=0.0, evals=0.0, drop=0.0):
    """Steps that are saved for the loss, from the mean up to the step before."""
    means = np.convolve(LOSSES[1:], np.ones(WINDOW) / WINDOW, "valid")
    level, found = means[0], []
    for step, mean in enumerate(means[1:], WINDOW + 1):
        if drop and mean <= (1 - drop) * level and step < part.done:
            level = mean
            found.append(step + 1)
    assert bool(found) == bool(drop)
    return found


def expected(part):
    return [*range(SAVE_EVERY, part.done, SAVE_EVERY), part.done]


def line(number):
    numbers = dict.fromkeys(("tokens", "elapsed_s", "memory_gb"), 1)
    return {"loss": float(LOSSES[number]), **numbers}


@pytest.mark.parametrize(
    "knobs",
    [{"optim": 1.5}, {"evals": 2.0}, {"optim": 1.5, "drop": 0.2}, {"drop": 0.02}],
)
def test_a_run_that_was_interrupted_anywhere_ends_and_saves_as_the_unbroken(
    tmp_path, knobs
):
    (tmp_path / "whole").mkdir()
    whole = Part(tmp_path / "whole", 0, **knobs)
    assert (whole.done < STEPS) == ("optim" in knobs or "evals" in knobs)
    assert bool(whole.why) == (whole.done < STEPS)
    assert {*whole.saved} == {*drops(whole, **knobs), *expected(whole)}
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().count("\n")
    for at in {*range(1, whole.done, 7), EVERY, WINDOW, whole.done - 1}:
        folder = tmp_path / str(at)
        folder.mkdir()
        before = Part(folder, 0, at, **knobs)
        assert (before.done, before.why) == (at, "")
        rest = Part(folder, at, **knobs)
        assert (rest.done, rest.why) == (whole.done, whole.why)
        # The stop saves its own step, which needs no second save.
        assert {*before.saved, *rest.saved, at} == {*whole.saved, at}
        assert (folder / "metrics.jsonl").read_text().count("\n") == lines


def test_the_losses_that_decide_are_means_of_full_windows_and_evaluations():
    optim, evals = OptimConfig(stop_loss=1.0), EvalConfig(stop_loss=2.0)
    watch, none = LossWatch(), (OptimConfig(), EvalConfig())
    for step in range(1, WINDOW):
        watch.add(step, 0.5, 0.0)
    assert not watch.why_end(WINDOW, optim, evals), "no full window"
    watch.add(WINDOW, 5.0, 0.0)
    assert not watch.why_end(WINDOW, optim, evals), "that loss is not known there yet"
    assert "training loss was 0.9500" in watch.why_end(WINDOW + 1, optim, evals)
    assert not watch.why_end(WINDOW + 1, *none)
    watch.add(WINDOW + 1, math.nan, 0.0)
    assert not watch.why_end(WINDOW + 2, optim, evals), "a loss is not finite"
    watch.evaluated = 2.0
    said = watch.why_end(WINDOW + 2, optim, evals)
    assert said == "the held-out loss was 2.0000, and config.eval.stop_loss is 2"


def test_evaluations_of_other_rows_and_later_lines_do_not_count(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for step, loss, rows in [(0, 0.1, ROWS), (4, 3.0, ROWS), (6, 0.2, "others")]:
        file.write(step, "eval", {"loss": loss, "data": rows})
    file.close()
    knobs = OptimConfig(), EvalConfig(stop_loss=1.0), CheckpointConfig()
    assert resumed_watch(tmp_path, 8, ROWS, *knobs).evaluated == 3.0
    assert resumed_watch(tmp_path, 3, ROWS, *knobs).evaluated is None
    off = dataclasses.replace(knobs[1], stop_loss=0.0)
    assert resumed_watch(tmp_path, 8, ROWS, knobs[0], off, knobs[2]) == LossWatch()


def test_a_run_that_may_end_early_trains_alone():
    from research.config.run_config import Config

    runs = [Config(run_dir=x, optim=OptimConfig(stop_loss=1.0)) for x in "ab"]
    with pytest.raises(UserError, match=r"optim.stop_loss is 1.0; runs train together"):
        compatibility.check(runs)


@pytest.mark.soak
def test_a_run_that_a_loss_ends_is_complete_and_the_same_after_a_kill(tmp_path):
    make_small_place(tmp_path)
    changes = {
        "eval": EvalConfig(every=4, prompts=0, answers_rows=0),
        "checkpoint": CheckpointConfig(every=4, keep_last=9, loss_drop=0.2),
        "optim": OptimConfig(learning_rate=1e-2, stop_loss=4.0),
    }

    def config(name):
        made = small_config(tmp_path, name, 40)
        return dataclasses.replace(made, export=False, **changes)

    def lines(name):
        found = read_metrics(tmp_path / name)
        return [(x["step"], x["kind"], x["loss"]) for x in found if "loss" in x]

    assert train([config("whole")]) == 0
    whole = RunDir(tmp_path / "whole")
    facts = json.loads((whole.path / "complete.json").read_text())
    assert facts["steps"] < 40 and "stop_loss is 4" in facts["ended early"]
    assert lines("whole")[-1][:2] == (facts["steps"], "eval")
    (last, *_) = History(whole.history, PhaseTimer()).starts
    assert last["exit_code"] == 0 and last["cause"].startswith("done after step ")
    as_killed(whole.path, 8, tmp_path / "killed")
    gc.collect()  # The lock of the start before.
    assert train([config("killed")]) == 0
    assert lines("killed") == lines("whole")
    steps = [
        [path.name for path in step_folders(tmp_path / name / "checkpoints")]
        for name in ("whole", "killed")
    ]
    assert steps[0] == steps[1]
    gc.collect()
    with pytest.raises(UserError, match=r"--config.accept=\"\('optim.stop_loss',\)\""):
        other = OptimConfig(learning_rate=1e-2, stop_loss=3.0)
        train([dataclasses.replace(config("killed"), optim=other)])
