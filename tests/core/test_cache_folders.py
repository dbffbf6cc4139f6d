"""Entries of a cache that no start has used for long are removed, and no others."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from research.config.data_knobs import TextConfig
from research.core import cache_folders
from research.core.cache_folders import KEPT_DAYS, USED, sweep, use_entry
from research.data.text.source_fingerprint import sweep_old

OLD = time.time() - (KEPT_DAYS + 1) * 86400


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """The marks that this process holds."""
    found = {}
    monkeypatch.setattr(cache_folders, "_held", found)
    yield found
    end_process(found)


def end_process(held):
    for mark in held.values():
        os.close(mark)
    held.clear()


def make_entry(folder, used):
    folder.mkdir(parents=True)
    (folder / "inner").mkdir()
    (folder / "inner" / "data").write_text("12345")
    for path in (folder / USED, folder) if used else (folder,):
        if path != folder:
            path.touch()
        os.utime(path, (OLD, OLD))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("used", [True, False])
def test_an_old_entry_goes_with_a_line(tmp_path, caplog, used):
    """One of an earlier program has no mark; its folder's time counts."""
    caplog.set_level("INFO")
    make_entry(tmp_path / "old", used)
    use_entry(tmp_path / "new")
    (tmp_path / "file").touch()
    half = make_entry(tmp_path / f".half{cache_folders.REMOVED}", used)
    os.utime(half)
    sweep(tmp_path)
    assert names(tmp_path) == ["file", "new"]
    assert "removed" in caplog.text and f"{tmp_path / 'old'}" in caplog.text
    sweep(tmp_path / "no such folder")


def test_a_start_that_uses_an_entry_keeps_it(tmp_path, held):
    entry = make_entry(tmp_path / "old", True)
    use_entry(entry)
    end_process(held)
    sweep(tmp_path)
    assert (entry / "inner" / "data").exists()


def test_an_entry_in_use_stays_however_long_the_run_is(tmp_path, held):
    entry = make_entry(tmp_path / "old", True)
    use_entry(entry)
    os.utime(entry / USED, (OLD, OLD))
    sweep(tmp_path)
    assert names(tmp_path) == ["old"]
    end_process(held)
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_an_entry_that_was_removed_in_between_is_made_and_held_anew(tmp_path, held):
    entry = tmp_path / "entry"
    use_entry(entry)
    entry.rename(tmp_path / "gone")
    use_entry(entry)
    os.utime(entry / USED, (OLD, OLD))
    sweep(tmp_path)
    assert names(entry) == [USED]


def test_threads_that_use_one_entry_close_each_descriptor_once(
    tmp_path, held, monkeypatch
):
    """A second close would hit a file that another thread has opened since."""
    close = os.close

    def slow_close(number):
        time.sleep(0.001)
        close(number)

    monkeypatch.setattr(cache_folders.os, "close", slow_close)
    for attempt in range(20):
        entry = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use_entry, [entry] * 8))
        assert held.keys() >= {entry} and os.fstat(held[entry])


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache_folders.fcntl, "flock", refuse)
    make_entry(tmp_path / "old", True)
    use_entry(tmp_path / "mine")
    sweep(tmp_path)
    assert names(tmp_path) == ["mine", "old"]


def test_the_users_cache_is_swept_and_a_folder_with_a_name_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    groups = [tmp_path / "research" / name for name in ("rows", "tokens", "compiled")]
    for group in groups:
        make_entry(group / "old", True)
    sweep_old(TextConfig(cache_dir=str(tmp_path / "research")))
    assert [names(group) for group in groups] == [["old"]] * 3
    sweep_old(TextConfig())
    assert [names(group) for group in groups] == [[], [], ["old"]]
