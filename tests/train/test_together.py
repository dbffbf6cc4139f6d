"""Runs that train as one program equal the same runs, each trained alone."""

import contextlib
import dataclasses
import functools
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from commands import CHAINS, STEPS, chain
from helpers import in_soak
from run_results import check_equal, final_state

from research.config.run_config import Config
from research.core.errors import PREEMPTED, DivergedError
from research.data.grouped_values import by_group
from research.runs.control.os_signals import Preempted
from research.runs.display_files import read_answers
from research.runs.run_directory import RunDir
from research.train import start_to_report

# Every kind of knob that may differ does.
RUNS = {
    "plain": {},
    "large": {
        "lora.rank": 5,
        "lora.alpha": 3.0,
        "lora.dropout": 0.3,
        "lora.targets": ["attention"],
        "optim.learning_rate": 3e-3,
        "optim.schedule": "linear",
        "seed": 2,
    },
    "pattern": {
        "lora.targets": ["mlp", "query"],
        "lora.rank_pattern": ["mlp=3"],
        "lora.alpha_pattern": ["down=40"],
        "lora.kind": "pissa",
        "lora.rslora": True,
        "optim.rate_pattern": ["[.]b$=4"],
        "optim.schedule": "wsd",
        "optim.warmup": 0.2,
        "optim.decay": 0.4,
        # The same seed as the plain run: they share their rows.
        "seed": 0,
    },
}
SHARED = ("--config=config.py", "--config.eval.prompts=1")


def names(place):
    """Two runs are a pack, too; in `make soak` all of them are."""
    return [name for name in RUNS if name != "large" or not place.quick]


def flags(place, folder):
    wanted = [
        {"run_dir": f"runs/{folder}-{name}", **RUNS[name]} for name in names(place)
    ]
    file = place.folder / f"{folder}.json"
    file.write_text(json.dumps(wanted))
    return *SHARED, f"--runs={file.name}"


def alone_of(name):
    """The run directory of that run alone; the plain one is there already."""
    return f"alone-{name}" if RUNS[name] else "unbroken"


def train_alone(place, results, name):
    if not RUNS[name]:
        return results("unbroken")
    changes = {
        knob: tuple(value) if isinstance(value, list) else value
        for knob, value in RUNS[name].items()
    }
    where = f"--config.run_dir=runs/alone-{name}"
    own = (f"--config.{knob}={value}" for knob, value in changes.items())
    return place.run("train", *SHARED, where, *own)


# Not in the background: only what a chosen test asks for.
CHAINS["alone"] = {
    f"alone-{name}": functools.partial(train_alone, name=name) for name in RUNS
}


@chain
def together(place, results):
    """One after another, as a CPU does it unasked."""
    results("unbroken")
    return place.run("train.together", *flags(place, "together"))


@chain
def vmapped(place, results):
    """All at once, as accelerators do it; and two, and the one that is left."""
    return {
        n: place.run("train.together", *flags(place, f"vmap{n}"), f"--at_once={n}")
        for n in (len(RUNS), 2)
    }


@chain
def together_in_parts(place, results):
    results("together")
    command = flags(place, "parts")
    stopped = place.start("train.together", *command)
    stopped.wait_for(rf"step +7/{STEPS} ")
    stopped.send(signal.SIGTERM)
    return stopped.finish(), place.run("train.together", *command)


EACH = ["plain", in_soak("large"), in_soak("pattern")]


@pytest.mark.parametrize("name", EACH)
def test_each_run_equals_itself_alone(place, results, together, name):
    alone = results(f"alone-{name}")
    assert alone.code == 0, alone.err
    assert together.code == 0, together.err
    until = STEPS // 2 if name == "pattern" else STEPS
    check_same_numbers(place, alone_of(name), f"together-{name}", until=until)


@pytest.mark.soak
@pytest.mark.parametrize("at_once", [len(RUNS), 2])
def test_runs_under_vmap_are_runs_in_turn(place, together, vmapped, at_once):
    assert vmapped[at_once].code == 0, vmapped[at_once].err
    for name in RUNS:
        runs = f"vmap{at_once}-{name}", f"together-{name}"
        check_same_numbers(place, *runs, until=STEPS // 2)


def check_same_numbers(place, *runs, until=STEPS):
    """Up to rounding; after step `until` to what the rates of `pattern` make of it."""
    for kind in ("train", "eval"):
        one, other = (place.lines(run, kind) for run in runs)
        assert [x["step"] for x in one] == [x["step"] for x in other]
        for a, b in zip(one, other, strict=True):
            within, of_norm = (1e-5, 1e-3) if a["step"] <= until else (1e-3, 0.1)
            assert b["loss"] == pytest.approx(a["loss"], rel=within)
            losses = by_group(a, "loss")
            assert losses
            assert by_group(b, "loss") == pytest.approx(losses, rel=within)
            if kind == "train":
                assert a["batch_hash"] == b["batch_hash"]
                assert a["learning_rate"] == b["learning_rate"]
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=of_norm)


@pytest.mark.parametrize("name", EACH)
def test_a_checkpoint_is_that_of_the_run_alone(place, results, together, name):
    """Each run keeps its own rank and targets: no padding remains."""
    assert results(f"alone-{name}").code == 0
    one, other = (
        final_state(place, run) for run in (alone_of(name), f"together-{name}")
    )
    assert one.params.keys() == other.params.keys()
    shapes = [
        {p: {k: len(v) for k, v in pair.items()} for p, pair in x.params.items()}
        for x in (one, other)
    ]
    assert shapes[0] == shapes[1]
    for path, pair in one.params.items():
        for side, values in pair.items():
            a, b = (
                np.frombuffer(x, np.float32) for x in (values, other.params[path][side])
            )
            np.testing.assert_allclose(b, a, atol=2e-3, err_msg=f"{path}.{side}")


def test_they_are_ordinary_run_directories(place, together):
    """Complete, reported, and not trained again."""
    again = place.run("train.together", *flags(place, "together"))
    assert again.code == 0 and again.err.count("is complete") == len(names(place))
    answer = place.generate("together-pattern", "--prompt=Hello")
    assert answer.code == 0, answer.err
    for name in names(place):
        folder = place.run_dir(f"together-{name}")
        shown = {"report.md", "loss.png", "doctor.json", "preview.json", "answers.json"}
        assert {"complete.json", *shown} <= {x.name for x in folder.iterdir()}
        history = json.loads((folder / "run.json").read_text())
        assert [x["cause"] for x in history["starts"]][-1] == "done"


def test_the_base_model_is_asked_once_and_quoted_by_all(place, unbroken, together):
    """Those of one seed share their prompts; one alone asks for itself."""
    first = base_answers(place, "unbroken")[:1]
    assert first == base_answers(place, "together-plain")
    assert first == base_answers(place, "together-pattern")


def base_answers(place, run):
    return [answer.base for answer in read_answers(place.run_dir(run))]


@pytest.mark.soak
def test_a_stopped_pack_goes_on_exactly(place, together, together_in_parts):
    stopped, last = together_in_parts
    assert stopped.code == PREEMPTED, stopped.err
    assert last.code == 0, last.err
    for name in RUNS:
        check_equal(place, f"parts-{name}", f"together-{name}")
        whole, parts = (
            final_state(place, f"{x}-{name}") for x in ("together", "parts")
        )
        assert whole == parts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["prepare", "_train"])
def test_a_signal_outside_of_the_steps_asks_to_be_started_again(
    tmp_path, monkeypatch, where, number
):
    """As `research.train` does: what starts it again goes by the exit code."""
    folders = [RunDir(tmp_path / name) for name in "ab"]
    for folder in folders if where == "_train" else folders[:1]:
        with folder.create(Config(), {}, []):
            pass
        folder._lock.release()

    def interrupted(*_):
        raise Preempted(number)

    monkeypatch.setattr(start_to_report.runtime, "start", lambda config: None)
    monkeypatch.setattr(start_to_report, "prepare", lambda *_: [])
    monkeypatch.setattr(start_to_report, where, interrupted)
    configs = [dataclasses.replace(Config(), run_dir=str(f.path)) for f in folders]
    assert start_to_report.train(configs) == PREEMPTED
    for folder in folders:
        if folder.exists:
            (start,) = json.loads(folder.history.read_text())["starts"]
            assert start["cause"] == f"{number.name} outside of training steps"
            assert start["exit_code"] == PREEMPTED
        else:
            assert not folder.path.exists()


class Apart:
    """Runs `a`, `b` that a kill left at steps 2 and 5 of 9, and what `fit` does."""

    def __init__(self, tmp_path, monkeypatch, fit):
        self.folders = [RunDir(tmp_path / name) for name in "ab"]
        self.config = dataclasses.replace(Config(), steps=9)
        for folder in self.folders:
            with folder.create(self.config, {}, []):
                pass
            folder._lock.release()
        self.fitted = []
        steps = iter((2, 5))

        def prepare(opened, phases):
            return [
                SimpleNamespace(
                    config=x.config,
                    folder=x.folder,
                    history=x.history,
                    phases=phases,
                    ended_early="",
                )
                for x in opened
            ]

        def fit_apart(restored, first, stop, at_once):
            self.fitted.append(first)
            return fit(restored, first, stop)

        patches = {
            "prepare": prepare,
            "claim": lambda runs, opened: [{} for _ in runs],
            "open_checkpoints": lambda *run: contextlib.nullcontext(),
            "restore": lambda run, checkpointer: (next(steps), None),
            "record_start": lambda *run: None,
            "finish": lambda run, steps: None,
            "fit": fit_apart,
        }
        for name, function in patches.items():
            monkeypatch.setattr(start_to_report, name, function)
        monkeypatch.setattr(start_to_report.runtime, "start", lambda config: None)
        monkeypatch.setattr(start_to_report.runtime, "leave", lambda code: None)

    def train(self):
        configs = [
            dataclasses.replace(self.config, run_dir=str(folder.path))
            for folder in self.folders
        ]
        code = start_to_report.train(configs)
        starts = [json.loads(x.history.read_text())["starts"] for x in self.folders]
        return code, [(start["cause"], start["exit_code"]) for (start,) in starts]


def test_a_pack_that_had_not_begun_when_a_signal_came_records_it(tmp_path, monkeypatch):
    """Or the next start would take it for killed."""

    def stopped(restored, first, stop):
        stop.signal = signal.SIGTERM
        return first + 1

    runs = Apart(tmp_path, monkeypatch, stopped)
    code, ends = runs.train()
    assert code == PREEMPTED and runs.fitted == [2]
    assert ends == [
        ("SIGTERM after step 3", PREEMPTED),
        ("SIGTERM after step 5", PREEMPTED),
    ]


def test_a_run_that_diverges_apart_does_not_stop_the_others(tmp_path, monkeypatch):
    def diverged(restored, first, stop):
        if first == 5:
            return 9
        restored[0].diverged = DivergedError("step 4 gave loss nan", 4, 3)
        raise restored[0].diverged

    runs = Apart(tmp_path, monkeypatch, diverged)
    code, ends = runs.train()
    assert code == DivergedError.exit_code and runs.fitted == [2, 5]
    assert ends == [("step 4 gave loss nan", DivergedError.exit_code), ("done", 0)]


def test_a_signal_during_the_reports_keeps_how_stopped_runs_ended(
    tmp_path, monkeypatch
):
    def stopped_late(restored, first, stop):
        if first == 5:
            stop.signal = signal.SIGTERM
            return 7
        return 9

    code, ends = Apart(tmp_path, monkeypatch, stopped_late).train()
    assert code == PREEMPTED
    assert ends == [
        ("SIGTERM outside of training steps", PREEMPTED),
        ("SIGTERM after step 7", PREEMPTED),
    ]


@pytest.mark.soak
def test_a_pack_of_which_all_diverge_does_not_train_on(place, results):
    results("unbroken")
    both = {"optim.learning_rate": 1e30}
    wanted = [{"run_dir": f"runs/lost-{seed}", "seed": seed, **both} for seed in (0, 1)]
    (place.folder / "lost.json").write_text(json.dumps(wanted))
    # Going on would take longer than any test may.
    far = ("--config.optim.clip_norm=0", "--config.steps=1000000")
    done = place.run("train.together", *SHARED, "--runs=lost.json", *far)
    assert done.code == DivergedError.exit_code, done.err
    assert "Traceback" not in done.err
    for seed in (0, 1):
        lines = place.lines(f"lost-{seed}", "train")
        assert 0 < len(lines) < STEPS // 2
        history = json.loads((place.run_dir(f"lost-{seed}") / "run.json").read_text())
        assert history["starts"][-1]["exit_code"] == DivergedError.exit_code


BAD = {
    "another knob": (
        [{"steps": 3, "run_dir": "runs/x"}, {"run_dir": "runs/y"}],
        "may differ only in",
    ),
    "mistyped knob": ([{"lora.rnak": 3}], "'lora.rank'"),
    "one folder twice": ([{"run_dir": "runs/x"}] * 2, "two runs"),
    "wrong type": ([{"lora.rank": "many"}], "run 1: config.lora.rank"),
    "no list": ({}, "list of objects"),
}


@pytest.fixture(scope="module")
def refused(place):
    commands = {}
    for number, (name, (wanted, _)) in enumerate(BAD.items()):
        file = place.folder / f"bad-{number}.json"
        file.write_text(json.dumps(wanted))
        flags = (*SHARED, f"--runs={file.name}")
        commands[name] = (place, "train.together", flags, 1)
    return place.run_short(commands)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_train_together_is_refused(place, refused, name):
    done, said = refused[name], BAD[name][1]
    assert done.code == 2 and said in done.err, done.err
    assert "Traceback" not in done.err
    assert not place.run_dir("x").exists()
