"""A run directory that is moved or removed ends the run; nothing takes its place."""

import json
import types

import pytest

from research.config.run_config import Config
from research.core.errors import SaveError
from research.runs.metrics_file import MetricsFile
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.train.finish_run import finish


@pytest.fixture
def folder(tmp_path):
    found = RunDir(tmp_path / "run")
    with found.create(Config(), {"data": "d"}, []):
        pass
    yield found
    found._lock.release()


def move(folder, anew):
    """Moves it away; `anew` puts another run in its place."""
    folder.path.rename(folder.path.with_name("moved"))
    if anew:
        folder.path.mkdir()
        (folder.path / "metrics.jsonl").touch()


@pytest.mark.parametrize("anew", [False, True])
def test_no_line_is_written_into_a_folder_that_was_moved(folder, anew):
    metrics = MetricsFile(folder.path, 0)
    metrics.write(1, "train", {"loss": 2.0})
    metrics.sync()
    move(folder, anew)
    for action in (lambda: metrics.write(2, "train", {"loss": 1.0}), metrics.sync):
        with pytest.raises(
            FileNotFoundError, match=r"metrics\.jsonl was moved, replaced"
        ):
            action()
    metrics.close()
    if anew:
        assert [(x.name, x.read_bytes()) for x in folder.path.iterdir()] == [
            ("metrics.jsonl", b"")
        ]
    else:
        assert not folder.path.exists()
    moved = folder.path.with_name("moved") / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in moved.read_text().splitlines()] == [1]


@pytest.mark.parametrize("anew", [False, True])
def test_the_history_is_not_written_into_a_folder_that_was_moved(folder, anew):
    history = History(folder.history, PhaseTimer())
    history.begin()
    assert folder.history.is_file()
    move(folder, anew)
    history.event("anything")
    history.end("SaveError", 4)
    assert not folder.history.exists()


def test_no_report_is_made_of_a_folder_that_was_moved(folder):
    move(folder, anew=False)
    run = types.SimpleNamespace(config=Config(steps=9), folder=folder)
    with pytest.raises(SaveError, match=r"all 9 steps are saved, .* moved or removed"):
        finish(run, 9)
    assert not folder.path.exists()
