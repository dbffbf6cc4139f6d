"""One trainer at a time, the same run or a named difference, and its history."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import ROOT

from research.config.command_line import parse
from research.config.config_file import load_config_file
from research.config.knobs import changed
from research.config.run_config import (
    Config,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    TextConfig,
)
from research.config.saved_config import as_begun, differences, to_json, with_edition
from research.core.errors import INTERRUPTED, PREEMPTED, DamagedError, UserError
from research.generate.__main__ import GenerateFlags
from research.runs import run_history
from research.runs.control.os_signals import Preempted
from research.runs.phase_timer import PHASES, PhaseTimer
from research.runs.recorded_starts import RecordedStarts
from research.runs.run_directory import FILES, RunDir
from research.runs.run_history import UNKNOWN, Goodput, History, goodput

START = {
    "first": 0, "step": 30, "redone": 0, "cause": None,
    "seconds": {"start": 1.0, "step": 1.0},
}  # fmt: skip
IDENTITY = {"base model": "b", "tokenizer": "t", "data": "d"}


@pytest.fixture
def folder(tmp_path):
    found = RunDir(tmp_path / "run")
    with found.create(Config(), IDENTITY, ["rows.jsonl:3: empty"]):
        found.tokenizer.mkdir()
    found._lock.release()
    return found


# -- the lock ------------------------------------------------------------------------

HOLD = """
import sys, time
from research.runs.run_directory import RunDir
from research.runs.recorded_starts import RecordedStarts
from research.runs.control.os_signals import Preempted
folder = RunDir(sys.argv[1])
folder.lock()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_trainer_is_refused_until_the_first_is_dead(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    with holder, contextlib.ExitStack() as stack:
        stack.callback(holder.kill)
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process .*process {holder.pid}"):
            RunDir(folder.path).lock()
        holder.send_signal(signal.SIGKILL)
    RunDir(folder.path).lock()


def test_two_that_begin_at_once_do_not_both_begin(tmp_path):
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    first.check_config(Config())
    second.check_config(Config())
    with (
        first.create(Config(), IDENTITY, []),
        pytest.raises(UserError, match="another"),
        second.create(Config(), IDENTITY, []),
    ):
        pass
    first._lock.release()
    late = second.create(Config(), IDENTITY, [])
    with pytest.raises(UserError, match="holds a run since just now"), late:
        pass


def test_a_creation_that_was_killed_is_begun_again(tmp_path):
    folder = RunDir(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), folder.create(Config(), IDENTITY, []):
        (folder.tokenizer).mkdir()
        raise ZeroDivisionError
    assert not folder.exists
    folder._lock.release()
    again = RunDir(tmp_path / "run")
    assert again.check_config(Config()) == {}
    with again.create(Config(), IDENTITY, []):
        pass
    assert again.exists


def test_a_mistyped_run_is_answered_with_the_one_beside_it(tmp_path):
    names = ["chats", "my other rün"]
    for name in names:
        (tmp_path / name / "checkpoints" / "20").mkdir(parents=True)
        for file in ("config.json", "identity.json"):
            (tmp_path / name / file).write_text("{}")
    runs = [str(tmp_path / name) for name in names]
    own = f"did you mean {runs[1]!r}?"
    for path, said in {
        "chat": f"did you mean {runs[0]!r}?",
        "": f"it holds the runs {runs[0]}, {runs[1]}",
        "my other rün/checkpoints": own,
        "my other rün/checkpoints/20": own,
        "my other rün/report.md": own,
    }.items():
        with pytest.raises(UserError, match=r"it has no config\.json") as raised:
            RunDir(tmp_path / path).config()
        assert said in str(raised.value)
        (tmp_path / path).mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"it has no config\.json") as raised:
            load_config_file(str(tmp_path / path))
        assert said in str(raised.value)
        (tmp_path / "chat").rmdir() if path == "chat" else None
    with pytest.raises(UserError, match=rf"did you mean '--run={runs[1]}'\?"):
        parse(["door", runs[1], "hi"], "", GenerateFlags)


def test_a_folder_with_anything_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a run directory"):
        RunDir(tmp_path / "run").check_config(Config())


def test_a_path_upwards_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'\.\.' is refused"):
        RunDir(tmp_path / "runs" / ".." / "x").check_config(Config())


def test_a_link_that_leads_nowhere_is_refused_at_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(UserError, match="link is a link that leads nowhere"):
            RunDir(path).check_config(Config())


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} must not be written to"):
        RunDir(tmp_path / "a" / "run").check_config(Config())
    monkeypatch.undo()
    RunDir(tmp_path / "a" / "run").check_config(Config())
    with pytest.raises(UserError, match="name too long"):
        RunDir(tmp_path / ("x" * 256)).check_config(Config())
    with pytest.raises(UserError, match=r"no UTF-8 in this locale; .*LC_ALL"):
        RunDir(tmp_path / "\udcff").check_config(Config())


# -- the guard -----------------------------------------------------------------------

OTHERS = {
    "data.template": Config(data=DataConfig(template="dolly")),
    "data.path": Config(data=DataConfig(path="other.jsonl")),
    "data.seq_len": Config(data=DataConfig(seq_len=256)),
    "seed": Config(seed=1),
    "model.init_from": Config(model=ModelConfig(init_from="other")),
    "lora.rank": Config(lora=LoRAConfig(rank=8)),
    "lora.targets": Config(lora=LoRAConfig(targets=("mlp",))),
}


@pytest.mark.parametrize("knob", OTHERS)
def test_another_config_is_refused_by_name_or_accepted(folder, knob):
    other = OTHERS[knob]
    with pytest.raises(UserError, match=rf"{knob}: .* -> ") as refused:
        folder.check_config(other)
    assert "--config.accept" in str(refused.value)
    accepted = folder.check_config(dataclasses.replace(other, accept=(knob,)))
    assert accepted.keys() == {knob} and " -> " in accepted[knob]
    with pytest.raises(UserError, match=rf"{knob}: "):
        folder.check_config(dataclasses.replace(other, accept=("data.held_out",)))


ACCEPT_ALL = ("steps", "epochs", "lora.rank", "lora.targets", "optim.skip_spread")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ({"steps": 30}, {"steps": 20}, "raise config.steps to at least 30"),
        ({"steps": 30}, {"steps": 31}, ""),
        ({"epochs": 3.0}, {"steps": 20, "epochs": 0.0}, "raise config.steps to at lea"),
        ({"epochs": 3.0}, {"epochs": 1.0}, "raise config.epochs to at least 2.25"),
        ({"epochs": 3.0}, {"epochs": 2.25}, ""),
        ({}, {"lora.rank": 8, "seed": 1}, "no other config.lora.rank: drop the change"),
        (
            {},
            {"lora.targets": ("q_proj",), "lora.rank": 8},
            "lora.rank and config.lora",
        ),
        ({}, {"optim.skip_spread": 3.0}, "no other config.optim.skip_spread"),
        ({"optim.skip_spread": 3.0}, {"optim.skip_spread": 4.0}, ""),
    ],
)
def test_what_no_flag_can_accept_is_refused_with_what_can_work(
    tmp_path, old, new, said
):
    """A run of 40 planned steps that has saved step 30."""
    length = {"steps": -1} if "epochs" in old else {"steps": 40, **old}
    config = changed(Config(), length | old, "test")
    folder = RunDir(tmp_path / "run")
    with folder.create(config, IDENTITY, []):
        pass
    folder._lock.release()
    other = changed(config, new, "test")
    history = run_history.read(folder.history)
    for saved in (0, 30):
        history |= {"saved": saved, "starts": [START | {"steps": 40}]}
        folder.history.write_text(json.dumps(history))
        for accept in ((), (*ACCEPT_ALL, "seed")):
            if said and saved:
                with pytest.raises(UserError, match="has made 30 steps") as raised:
                    folder.check_config(dataclasses.replace(other, accept=accept))
                assert said in str(raised.value)
                assert "--config.accept" not in str(raised.value)
            elif accept:
                folder.check_config(dataclasses.replace(other, accept=accept))
            else:
                with pytest.raises(UserError, match=r"add --config\.accept"):
                    folder.check_config(other)


@pytest.mark.parametrize("part", IDENTITY)
def test_another_identity_is_refused_by_name_or_accepted(folder, part):
    other = IDENTITY | {part: "other"}
    with pytest.raises(UserError, match=rf"{part}: {IDENTITY[part]} -> other"):
        folder.check_identity(other)
    accepted = {part: f"{IDENTITY[part]} -> other"}
    assert folder.check_identity(other, [part]) == accepted


def test_a_mistyped_exception_names_the_nearest(folder):
    with pytest.raises(UserError, match=r"did you mean 'tokenizer'"):
        folder.check_config(Config(accept=("tokeniser",)))


def test_an_identity_that_is_none_is_named_with_a_way_back(folder):
    for content in (None, "[]", '{"base model": "b", "tokenizer": "t"}', "\0"):
        (folder.path / "identity.json").unlink(missing_ok=True)
        if content is not None:
            (folder.path / "identity.json").write_text(content)
        with pytest.raises(UserError, match=r"identity\.json cannot .*meta/metadata"):
            folder.check_identity(IDENTITY)


def test_an_id_that_is_no_text_is_named(folder):
    (folder.path / "identity.json").write_text(json.dumps(IDENTITY | {"run": 5}))
    with pytest.raises(UserError, match=r"identity\.json cannot .*it\.run is 5"):
        folder.origin()


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_before_anything_is_loaded(folder, name):
    path, config = folder.path / name, folder.config()
    path.unlink(missing_ok=True)
    for make, undo in (
        (path.mkdir, path.rmdir),
        (lambda: path.symlink_to("nowhere"), path.unlink),
    ):
        make()
        with pytest.raises(UserError, match=f"{name} cannot"):
            folder.check_config(config)
        undo()


def test_a_run_keeps_its_own_id(folder, tmp_path):
    origin = folder.origin()
    assert len(origin["run"]) == 32
    folder.update(IDENTITY | {"data": "new"}, [])
    assert folder.identity() == IDENTITY | {"data": "new"} | origin
    other = RunDir(tmp_path / "other")
    assert other.origin() == {}
    with other.create(Config(), IDENTITY, []):
        pass
    assert other.origin() != origin
    (folder.path / "identity.json").write_text(json.dumps(IDENTITY))  # An older run.
    assert folder.origin() == {} == folder.check_identity(IDENTITY)


def test_a_mark_of_completion_that_is_none_is_named(folder):
    assert not folder.is_complete
    folder.mark_complete({})
    assert folder.is_complete
    (folder.path / "complete.json").write_text("")
    with pytest.raises(UserError, match=r"complete\.json cannot be used .*remove it"):
        assert folder.is_complete


def test_a_run_directory_of_an_earlier_version_opens(folder):
    """Its config names the base model otherwise, and its identity has no id."""
    (old, *_) = sorted((ROOT / "tests/golden/kept/configs").iterdir())
    assert '"weights": "pkg://' in old.read_text()
    shutil.copy(old, folder.path / "config.json")
    (folder.path / "identity.json").write_text(json.dumps(IDENTITY))
    config = folder.config()
    assert config.model.init_from.startswith("pkg://") and config.lora.rank == 8
    assert folder.check_config(config) == {} == folder.check_identity(IDENTITY)
    folder.update(IDENTITY, [], config)  # An accepted difference writes it anew.
    assert folder.config() == config and "weights" not in str(config)


# -- the history ---------------------------------------------------------------------


def test_the_history_keeps_every_start_and_its_cause(folder):
    phases = PhaseTimer(3.0)
    first = History(folder.history, phases)
    first.begin()
    first.resume_from(0)
    first.note(7)
    first.commit(5)
    # Killed here; the next one finds no word of it.
    second = History(folder.history, phases)
    assert second.saved == 5
    second.begin()
    second.resume_from(5)
    second.skip(6)
    second.accept({"data": "a -> b"}, 7)
    second.end("SIGTERM after step 6", 75)
    second.end("later", 1)
    found = json.loads(folder.history.read_text())
    one, two = found["starts"]
    assert (one["first"], one["step"], one["exit_code"]) == (0, 7, None)
    assert "without a word" in one["cause"]
    assert (two["cause"], two["exit_code"]) == ("SIGTERM after step 6", 75)
    third = History(folder.history, phases)
    assert third.skipped == [6] and third.accepted == {"data": "a -> b"}
    assert "accepted: data: a -> b" in found["events"][0]["what"]
    third.accept({"data": "b -> c", "steps": "7 -> 9"}, 7)
    third.accept({"data.seq_len": "8 -> 16"}, 8)
    assert History(folder.history, phases).accepted_by_step == {
        7: ["data: a -> b", "data: b -> c", "steps: 7 -> 9"],
        8: ["data.seq_len: 8 -> 16"],
    }


def test_losses_are_compared_on_the_same_held_out_rows_only(folder):
    """Another split, template or length measures other tokens of the same rows."""
    history = History(folder.history, PhaseTimer(3.0))
    assert history.measured_on("sha", {"steps": "7 -> 9", "data": "a -> sha"}) == "sha"
    for alike in ("data.path", "data.batch_size", "optim.learning_rate", "text.cache"):
        assert history.measured_on("sha", {alike: "1 -> 2"}) == "sha"
    marks = {
        history.measured_on("sha", {name: "1 -> 2"})
        for name in ("data.held_out", "data.seq_len", "data.template", "seed")
    }
    assert len(marks) == 4 and "sha" not in marks
    history.accept({"data.held_out": "1 -> 2"}, 3)
    assert history.measured_on("sha", {}) in marks


def test_a_start_that_ends_before_its_first_step_is_kept(folder):
    """With what it was made of, and without a word of steps."""
    phases = PhaseTimer(3.0)
    failed = RecordedStarts(phases)
    failed.open(folder)
    assert failed.ended_by(DamagedError("all are damaged\nsee above")) == 5
    folder._lock.release()
    stopped = RecordedStarts(phases)
    stopped.open(folder)
    assert stopped.ended_by(Preempted(signal.SIGINT)) == PREEMPTED
    one, two = json.loads(folder.history.read_text())["starts"]
    assert (one["cause"], one["exit_code"]) == ("DamagedError: all are damaged", 5)
    assert (two["cause"], two["exit_code"]) == ("SIGINT outside of training steps", 75)
    for start in (one, two):
        assert start["first"] is start["step"] is None
        assert start["provenance"]["packages"]["jax"] and start["ended"]
        assert start["seconds"]["start"] >= 3.0
    assert goodput([one, two]).by_phase["restart"] >= 3.0


def test_a_run_is_read_only_under_its_lock(folder, monkeypatch):
    """Whoever holds it may just now leave a batch out."""
    lock = folder.lock

    def lock_late():
        History(folder.history, PhaseTimer()).skip(4)
        lock()

    monkeypatch.setattr(folder, "lock", lock_late)
    assert RecordedStarts(PhaseTimer()).open(folder).skipped == [4]


def test_what_is_refused_the_lock_is_not_written_down(folder):
    other = RunDir(folder.path)
    other.lock()
    starts = RecordedStarts(PhaseTimer())
    with pytest.raises(UserError, match="another process") as refused:
        starts.open(folder)
    assert starts.ended_by(refused.value) == 2
    assert not folder.history.exists()


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, PREEMPTED),
        (signal.SIGHUP, PREEMPTED),
        (signal.SIGINT, INTERRUPTED),
    ],
)
def test_a_signal_before_there_is_a_run_leaves_nothing(tmp_path, number, code):
    starts = RecordedStarts(PhaseTimer())
    history = starts.open(RunDir(tmp_path / "run"))
    assert starts.ended_by(Preempted(number)) == code
    assert history.goodput().total == 0 and not list(tmp_path.iterdir())


def test_a_history_that_is_none_is_the_users_error(folder):
    for content in ('{"starts": 3}', "", "\0", "[]"):
        folder.history.write_text(content)
        with pytest.raises(UserError, match=r"run\.json cannot be used .*restore"):
            History(folder.history, PhaseTimer())
        assert folder.history.read_text() == content


def test_a_start_with_a_wrong_entry_is_the_users_error(folder):
    history = History(folder.history, PhaseTimer())
    history.begin()
    history.resume_from(2)
    good = json.loads(folder.history.read_text())
    for entry, said in (
        ({"step": None}, r"starts\[0\]\.step is None"),
        ({"seconds": good["starts"][0]["seconds"] | {"save": "x"}}, "save is 'x'"),
    ):
        odd = good | {"starts": [good["starts"][0] | entry]}
        folder.history.write_text(json.dumps(odd))
        with pytest.raises(UserError, match=rf"run\.json cannot .*{said}.*restore"):
            History(folder.history, PhaseTimer())


def test_a_history_of_an_earlier_version_continues(folder):
    """Its starts have no provenance, and its program knew no requests."""
    shutil.copy(ROOT / "tests/golden/kept/run.json", folder.history)
    history = History(folder.history, PhaseTimer())
    assert (history.saved, history.skipped) == (5, [3])
    history.begin()
    history.resume_from(5)
    history.answer_request({"id": "x"})
    starts = json.loads(folder.history.read_text())["starts"]
    assert [x["cause"] for x in starts] == ["SIGTERM after step 7", UNKNOWN, None]
    assert history.goodput().by_phase["restart"] > 0


def test_threads_that_record_at_once_leave_the_newest_record(folder, monkeypatch):
    """The watchdog records the end while the main thread records a step."""
    history = History(folder.history, PhaseTimer())
    history.begin()
    inside, done, real = threading.Event(), threading.Event(), run_history.write_whole

    def write_slowly(path, text):
        if threading.current_thread() is slow:
            inside.set()
            done.wait(0.2)  # Unless the other thread waits, it writes meanwhile.
        real(path, text)
        done.set()

    monkeypatch.setattr(run_history, "write_whole", write_slowly)
    slow = threading.Thread(target=history.note, args=(3,))
    slow.start()
    inside.wait()
    history.end("watchdog", 6)
    slow.join()
    start = json.loads(folder.history.read_text())["starts"][0]
    assert (start["step"], start["cause"]) == (3, "watchdog")


def test_a_history_that_cannot_be_written_stops_nothing(folder, monkeypatch, caplog):
    history = History(folder.history, PhaseTimer())
    history.begin()
    history.resume_from(0)
    folder.history.unlink()
    folder.history.mkdir()  # No file can replace a folder.
    history.note(3)
    assert "could not be written" in caplog.text
    with pytest.raises(OSError):
        history.skip(1)  # A skip that is not recorded would break exact resume.


def start(first, last, seconds, redone=0):
    times = dict.fromkeys(PHASES, 0.0) | seconds
    return {"first": first, "step": last, "redone": redone, "seconds": times}


def test_goodput_is_the_share_of_steps_that_were_kept():
    found = goodput([start(0, 10, {"start": 10.0, "step": 60.0, "save": 30.0})])
    assert found == Goodput(
        100.0,
        dict.fromkeys((*PHASES, "restart"), 0.0)
        | {"start": 10.0, "step": 60.0, "save": 30.0},
    )
    assert found.share == 0.6


def test_steps_done_twice_and_later_starts_count_as_restart():
    found = goodput(
        [
            start(0, 10, {"start": 10.0, "step": 100.0}),  # Saved at 6: four are lost.
            start(
                6, 16, {"start": 20.0, "step": 60.0}, redone=10
            ),  # And half by a rollback.
        ]
    )
    assert found.by_phase["start"] == 10.0
    assert found.by_phase["step"] == 60.0 + 30.0
    assert found.by_phase["restart"] == 40.0 + 20.0 + 30.0
    assert found.total == 190.0


def test_steps_are_lost_to_any_later_start_and_only_once():
    found = goodput(
        [
            start(0, 10, {"step": 100.0}),
            start(None, None, {"start": 5.0}),  # Ended before it knew its first step.
            start(10, 12, {"step": 20.0}),
            start(6, 16, {"step": 100.0}),  # The checkpoint of step 10 was damaged.
        ]
    )
    assert found.by_phase["step"] == 60.0 + 0.0 + 100.0
    assert found.by_phase["restart"] == 40.0 + 5.0 + 20.0


def test_a_creation_broken_off_at_its_last_file_is_begun_again_too(tmp_path):
    """Killed between the config's temporary file and its rename."""
    torn = tmp_path / f".config.json.{7:032x}.tmp"
    torn.write_text("{")
    folder = RunDir(tmp_path)
    assert folder.check_config(Config(run_dir=str(tmp_path))) == {}
    with folder.create(Config(), IDENTITY, []):
        assert not torn.exists()  # Its writer is dead.
    folder._lock.release()


def test_a_tilde_in_the_run_directory_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir("~/runs/x").path == tmp_path / "runs" / "x"
    assert str(RunDir("~/runs/x")) == f"{tmp_path}/runs/x"
    with pytest.raises(UserError, match=r"config\.run_dir is ~nobody-here"):
        RunDir("~nobody-here/x")


def test_a_run_of_text_keeps_the_share_that_it_began_with():
    """Then 0.01 was the default; today it follows from the size of the text."""
    text, data = TextConfig(("a=b",), held_out_share=0.01), DataConfig(kind="text")
    begun = Config(data=data, text=text)
    for asked, found in ((-1.0, {}), (0.02, {"text.held_out_share": "0.01 -> 0.02"})):
        asked_text = dataclasses.replace(text, held_out_share=asked)
        config = Config(data=data, text=asked_text)
        alike = differences(
            to_json(begun), config, Path("run"), lambda c: as_begun(c, begun)
        )
        assert alike == found
    assert as_begun(Config(), begun).text.held_out_share == 0.01
    assert as_begun(Config(), Config()).text == Config().text
    assert as_begun(Config(), None).text.held_out_share == -1


def test_a_run_keeps_the_rows_that_its_edition_held_out():
    """Then 48 was the default; today it follows from the size of the data."""
    kept = Config(data=DataConfig(edition=2, held_out=48.0))
    assert with_edition(Config(), 2) == kept
    assert with_edition(Config(), 3).data.held_out == -1
    old = to_json(kept).replace("48.0", "48")  # It was an integer.
    for asked, found in ((-1.0, {}), (47.0, {"data.held_out": "48.0 -> 47.0"})):
        config = Config(data=DataConfig(held_out=asked))
        alike = differences(old, config, Path("run"), lambda c: with_edition(c, 2))
        assert alike == found
