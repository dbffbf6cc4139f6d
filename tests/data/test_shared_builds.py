"""Processes build one cache together: the failure of one is soon the end of all."""

import fcntl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from text_helpers import build, make_texts, write_texts

from research.core.errors import UserError
from research.data import shared_builds
from research.data.shared_builds import SharedUnits, one_at_a_time
from research.data.text import document_readers, source_fingerprint, token_cache

SOON = 10.0  # seconds, on a busy machine; those who wait for a shard wait longer


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(source_fingerprint, "FRESH_NS", -(10**12))
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 200)
    monkeypatch.setattr(token_cache, "SHARD_BYTES", 500)
    monkeypatch.setattr(token_cache, "UNIT_BYTES", 1000)
    monkeypatch.setattr(token_cache, "PATIENCE", 2 * SOON)


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(shared_builds.fcntl, "flock", refuse)


def corpus_of(tmp_path, unreadable=None):
    corpus = write_texts(tmp_path / "corpus", make_texts(60))
    if unreadable:
        (corpus / unreadable).write_bytes(b"text \xff")
    return corpus


def build_all(tmp_path, corpus, count):
    """The cache that each of `count` processes opens, or its error."""

    def one(index):
        try:
            return build(tmp_path, corpus, process=(index, count))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count), timeout=SOON))


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("unreadable", ["00000.txt", "00030.txt", "zz"])
def test_unreadable_text_ends_all_processes_with_one_error(
    tmp_path, unreadable, locks, request
):
    if not locks:
        request.getfixturevalue("no_locks")
    corpus = corpus_of(tmp_path, unreadable)
    begun = time.monotonic()
    first, *others = build_all(tmp_path, corpus, 3)
    assert time.monotonic() - begun < SOON
    assert first.startswith(f"{unreadable}:5: ")
    assert set(others) == {first}


def test_a_failure_elsewhere_is_met_before_the_own_units_are_made(tmp_path):
    corpus = corpus_of(tmp_path, "zz")  # In the last unit.
    with pytest.raises(UserError):
        build(tmp_path, corpus)
    folder = next((tmp_path / "cache" / "tokens").iterdir())
    last = max(int(path.name[1:7]) for path in folder.glob("u*.json")) + 1
    for path in folder.glob("u*"):
        path.unlink()
    (folder / "failed-0-of-1").rename(folder / "failed-1-of-2")
    assert (folder / "failed-1-of-2").read_text() == str(last)
    with pytest.raises(UserError, match="zz:5: "):
        build(tmp_path, corpus, process=(0, 2))
    assert not list(folder.glob("u*.json"))


def test_a_failure_that_is_over_is_forgotten(tmp_path):
    expected = build(tmp_path / "alone", corpus_of(tmp_path))
    corpus = tmp_path / "corpus"
    good = (corpus / "00030.txt").read_bytes()
    (corpus / "00030.txt").write_bytes(b"\xff" * len(good))
    with pytest.raises(UserError):
        build(tmp_path, corpus)
    (corpus / "00030.txt").write_bytes(good)
    stale = [f"failed-{n}-of-2" for n in (0, 1)]
    folder = tmp_path / "cache" / "tokens" / expected.folder.name
    folder.mkdir()
    for name, text in zip(stale, ("1", "no number"), strict=True):
        (folder / name).write_text(text)
    found = build_all(tmp_path, corpus, 2)
    assert [cached.manifest for cached in found] == [expected.manifest] * 2
    assert {p.name for p in folder.iterdir()} == {
        p.name for p in expected.folder.iterdir()
    }


def test_units_of_a_killed_process_are_made_by_the_others_at_once(tmp_path):
    corpus = corpus_of(tmp_path)
    expected = build(tmp_path / "alone", corpus)
    folder = tmp_path / "cache" / "tokens" / expected.folder.name
    folder.mkdir(parents=True)
    claim = folder / "process-1-of-2"
    claim.write_text(shared_builds._kernel())
    with ThreadPoolExecutor(1) as pool:
        with open(claim) as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            job = pool.submit(build, tmp_path, corpus, process=(0, 2))
            while len(list(folder.glob("u*.json"))) < 3:
                time.sleep(0.01)
            time.sleep(0.2)
            assert not job.done(), "it waits for one that lives"
        assert job.result(SOON).manifest == expected.manifest


@pytest.mark.parametrize("text", ["", "another machine"])
def test_a_lock_of_another_machine_proves_nothing(tmp_path, text):
    shared = SharedUnits(tmp_path, count=4, index=0, processes=2)
    assert not shared.is_abandoned(1)  # It may begin later.
    (tmp_path / "process-1-of-2").write_text(text)
    assert not shared.is_abandoned(1)
    (tmp_path / "failed-1-of-2").write_text("3")
    assert shared.is_abandoned(1) and shared.failed() == [3] and not shared.failed()


def test_whoever_waited_for_a_failure_fails_at_once_and_a_later_start_tries(tmp_path):
    waiting, work = threading.Barrier(3), []

    def one(text):
        try:
            with one_at_a_time(tmp_path, waiting.wait):
                work.append(text)
                if len(work) == 1:
                    waiting.wait(SOON)
                    raise UserError(text)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(one, ["a:1: no text"] * 3, timeout=SOON))
    assert said == ["a:1: no text"] * 3 and len(work) == 1
    assert one("again") is None and len(work) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
