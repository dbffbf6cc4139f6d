"""Processes build one cache together: the failure of one is soon the end of all."""

import fcntl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from text_helpers import build, make_texts, write_texts
from waiting import PATIENCE, wait_until

from research.core.errors import UserError
from research.data import shared_builds
from research.data.shared_builds import UnitClaims, one_at_a_time
from research.data.text import document_readers, source_fingerprint, token_cache

SOON = PATIENCE / 2  # seconds; those who wait for a shard wait longer


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
    assert first.startswith(f"{unreadable}:1: byte 5 ")
    assert set(others) == {first}


def test_units_that_others_gave_up_are_met_before_the_own_ones(tmp_path):
    corpus = corpus_of(tmp_path, "zz")  # In the last unit.
    with pytest.raises(UserError):
        build(tmp_path, corpus)
    folder = next((tmp_path / "cache" / "tokens").iterdir())
    for path in folder.glob("u*"):
        path.unlink()
    [claim] = (folder / "claims").iterdir()
    assert claim.read_bytes() == b""
    with pytest.raises(UserError, match="zz:1: byte 5 "):
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
    claims = tmp_path / "cache" / "tokens" / expected.folder.name / "claims"
    claims.mkdir(parents=True)
    for name in ("1", "999", "no number"):
        (claims / name).write_text("")
    found = build_all(tmp_path, corpus, 2)
    assert [cached.manifest for cached in found] == [expected.manifest] * 2
    assert {p.name for p in claims.parent.iterdir()} == {
        p.name for p in expected.folder.iterdir()
    }


def test_units_of_a_killed_process_are_made_by_the_others_at_once(tmp_path):
    corpus = corpus_of(tmp_path)
    expected = build(tmp_path / "alone", corpus)
    folder = tmp_path / "cache" / "tokens" / expected.folder.name
    (folder / "claims").mkdir(parents=True)
    claim = folder / "claims" / "1"
    claim.write_bytes(shared_builds._boot())
    with ThreadPoolExecutor(1) as pool:
        with open(claim) as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            job = pool.submit(build, tmp_path, corpus)
            wait_until(lambda: len(list(folder.glob("u*.json"))) >= 3)
            time.sleep(0.2)
            assert not job.done(), "it waits for one that lives"
        assert job.result(SOON).manifest == expected.manifest


def test_processes_take_other_units(tmp_path):
    done = set()
    with (
        UnitClaims(tmp_path, 6, done.__contains__) as one,
        UnitClaims(tmp_path, 6, done.__contains__) as other,
    ):
        mine, others = one.take([0, 1, 2, 3, 4, 5]), other.take([3, 4, 5, 0, 1, 2])
        assert [next(x) for x in (mine, others, mine, others)] == [0, 3, 1, 4]
        done.add(4)
        other.free(4)
        assert [next(others), next(mine)] == [5, 2]
        assert list(mine) == list(others) == []


def test_whoever_sees_another_disk_waits_for_nobody(tmp_path):
    corpus = corpus_of(tmp_path)
    expected = build(tmp_path / "alone", corpus)
    begun = time.monotonic()
    found = build(tmp_path, corpus, process=(3, 4))
    assert time.monotonic() - begun < SOON
    assert found.manifest == expected.manifest


@pytest.mark.parametrize("locks", [True, False])
def test_a_claim_of_another_machine_counts_without_a_lock(tmp_path, locks, request):
    if not locks:
        request.getfixturevalue("no_locks")
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "1").write_text("another boot")
    (tmp_path / "claims" / "3").write_text("")  # It was given up.
    done = set()
    with UnitClaims(tmp_path, 4, done.__contains__) as claims:
        taken = []
        for unit in claims.take(range(4)):
            taken.append(unit)
            done.add(unit)
            claims.free(unit)
        assert taken == [3, 0, 2]
        assert list(claims.take([1])) == []
        assert list(claims.take([1], alone=True)) == [1]
    assert (tmp_path / "claims" / "1").read_bytes() == b"", "given up"


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
