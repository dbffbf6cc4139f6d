"""The folder of an export is whole or not there, whoever is killed or writes too."""

import contextlib
import os
import subprocess
import sys
import time

import filelock
import pytest
from waiting import PATIENCE

from research.core.errors import UserError
from research.core.stop_signals import unwinding_on_signals
from research.formats.export_folder import ExportFolder
from research.formats.export_names import is_unfinished


def names(folder):
    return sorted(x.name for x in folder.iterdir())


def write(path, text):
    with ExportFolder.claimed(path) as claimed, claimed.filled() as partial:
        assert is_unfinished(partial.name)
        (partial / "file").write_text(text)


def leave(folder, name, *parts):
    """Makes the leftovers of an export `name` that was killed."""
    (folder / f".{name}.partial.lock").touch()
    for part in parts:
        (folder / f".{name}.{part}").mkdir()
        (folder / f".{name}.{part}" / "file").write_text(part)


def test_an_export_replaces_the_older_one_as_a_whole(tmp_path):
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_after_an_error_the_older_one_is_there_and_nothing_else(tmp_path):
    write(tmp_path / "out", "old")
    claim = ExportFolder.claimed(tmp_path / "out")
    with pytest.raises(KeyError), claim as claimed, claimed.filled() as partial:
        (partial / "file").write_text("new")
        raise KeyError
    assert (tmp_path / "out" / "file").read_text() == "old"
    with pytest.raises(KeyError), ExportFolder.claimed(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert names(tmp_path) == ["out"]


def test_the_next_export_beside_it_removes_what_a_kill_has_left(tmp_path):
    leave(tmp_path, "first", "partial")
    # Killed between the two renames: the older export has no name.
    leave(tmp_path, "second", "partial", "replaced")
    # Killed behind both: the new one has its name.
    leave(tmp_path, "third", "replaced")
    (tmp_path / "third").mkdir()
    (tmp_path / ".mine.partial").mkdir()  # It has no lock, so it is not ours.
    write(tmp_path / "out", "new")
    assert names(tmp_path) == [".mine.partial", "out", "second", "third"]
    assert (tmp_path / "second" / "file").read_text() == "replaced"
    assert names(tmp_path / "third") == []


def test_what_no_export_has_left_is_not_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").touch()
    with pytest.raises(UserError, match=r"\.out\.partial exists, .*: move it away"):
        write(tmp_path / "out", "new")
    assert names(tmp_path) == [".out.partial"]
    assert names(tmp_path / ".out.partial") == ["mine"]


def test_a_second_export_to_a_folder_is_refused_and_harms_nothing(tmp_path):
    claim = ExportFolder.claimed(tmp_path / "out")
    with claim as claimed, claimed.filled() as partial:
        (partial / "file").write_text("first")
        with pytest.raises(UserError, match=r"out is being written by another exp"):
            write(tmp_path / "out", "second")
        write(tmp_path / "beside", "third")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert names(tmp_path) == ["beside", "out"]


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    write(tmp_path / "out", "new")
    assert "file system without locks" in caplog.text
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "out, said",
    [
        (".", "holds the folder in which this command runs"),
        ("..", "holds the folder in which this command runs"),
        ("/proc", "is the root of a mounted disk"),
        ("file", "cannot be a folder: .*/file is none"),
        ("file/out", "cannot be a folder: .*/file is none"),
    ],
)
def test_a_place_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch, out, said):
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").touch()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=said):
        write(here.__class__(out), "new")
    assert names(here) == ["file"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "link", "one")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "file").read_text() == "two"


WRITES = """
import os, pathlib, signal, sys, threading
from research.core.stop_signals import unwinding_on_signals
from research.formats.export_folder import ExportFolder
with unwinding_on_signals(), ExportFolder.claimed(pathlib.Path("out")) as claimed:
    with claimed.filled() as partial:
        (partial / "file").write_text("half")
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        threading.Event().wait(600)
"""


@pytest.mark.parametrize(
    "name, code, left",
    [
        ("SIGTERM", 75, []),
        ("SIGINT", None, []),
        ("SIGKILL", -9, [".out.partial", ".out.partial.lock"]),
    ],
)
@pytest.mark.soak
def test_a_killed_export_leaves_nothing_that_looks_like_one(tmp_path, name, code, left):
    ended = subprocess.run(
        [sys.executable, "-c", WRITES, name], cwd=tmp_path, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, check=False,
    )  # fmt: skip
    assert code in (None, ended.returncode), ended.stderr
    assert names(tmp_path) == left
    write(tmp_path / "out", "whole")
    assert names(tmp_path) == ["out"]


def test_a_signal_unwinds_and_the_second_one_does_not(tmp_path, capfd):
    with (
        pytest.raises(SystemExit) as ended,
        unwinding_on_signals(),
        ExportFolder.claimed(tmp_path / "out") as claimed,
        contextlib.ExitStack() as stack,
        claimed.filled(),
    ):
        stack.callback(os.kill, os.getpid(), 15)  # While the folder is removed.
        os.kill(os.getpid(), 15)
        time.sleep(5)
    assert ended.value.code == 75
    assert capfd.readouterr().err.count("stopped by SIGTERM") == 1
    assert names(tmp_path) == []
