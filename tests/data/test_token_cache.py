"""A source is tokenised once, whole, and the same whoever is killed on the way."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from text_helpers import HELD_OUT_SHARE as SHARE
from text_helpers import build, make_texts, text_config, with_bos, write_texts
from waiting import wait_until

from research.core.errors import UserError
from research.data import dropped_documents
from research.data.text import document_readers, source_fingerprint, token_cache
from research.data.text.document_readers import DocumentPiece, TextSource
from research.data.text.row_layout import is_held_out
from research.data.text.token_cache import units_of
from research.data.text.tokenized_corpus import TokenStream
from research.tasks.pretraining import TextTask
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import byte_tokenizer, train_bpe


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Many pieces a document, many shards a unit, many units a source.

    And files that were written just now count as settled.
    """
    monkeypatch.setattr(source_fingerprint, "FRESH_NS", -(10**12))
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 200)
    monkeypatch.setattr(token_cache, "SHARD_BYTES", 1500)
    monkeypatch.setattr(token_cache, "UNIT_BYTES", 4000)


@pytest.fixture
def corpus(tmp_path):
    texts = make_texts(120, longest=80)
    # Larger than a unit, and than several shards: one for each side.
    large = ["".join(make_texts(60, seed=seed)) for seed in range(1, 40)]
    texts[7] = next(text for text in large if held(text))
    texts[70] = next(text for text in large if not held(text))
    return write_texts(tmp_path / "corpus", texts)


def stream(cached, side):
    tokens = TokenStream(cached, side)
    return tokens.read(0, len(tokens))


def files_of(cached):
    """Every file of a cache, by name, with its bytes."""
    return {path.name: path.read_bytes() for path in cached.folder.iterdir()}


def texts_in(folder):
    return [path.read_bytes().decode() for path in sorted(folder.iterdir())]


def held(text):
    limit = document_readers.PIECE_BYTES
    first = text[:limit]
    if len(text) > limit:
        first = first[: first.rfind("\n") + 1 or first.rfind(" ") + 1 or limit]
    return is_held_out(DocumentPiece(first, True, False, ""), SHARE)


def decoded(cached, side, tokenizer):
    """The documents of a stream, as text again."""
    ids = stream(cached, side)
    starts = np.flatnonzero(ids == cached.marks.start)
    assert len(starts) == 0 or starts[0] == 0
    parts = np.split(ids, starts[1:])
    return [tokenizer.decode(part.tolist()) for part in parts]


@pytest.mark.parametrize("kind", ["byte", "bpe", "bos", "wide"])
def test_every_document_is_whole_and_on_its_side(tmp_path, corpus, kind):
    texts = texts_in(corpus)
    tokenizer = byte_tokenizer() if kind == "byte" else train_bpe(iter(texts), 300)
    if kind in ("bos", "wide"):
        tokenizer = with_bos(tokenizer, 70_000 if kind == "wide" else 0)
    cached = build(tmp_path, corpus, tokenizer)
    assert cached.marks.dtype == ("<u4" if kind == "wide" else "<u2")
    sides = {"train": [], "held": []}
    for text in texts:
        sides["held" if held(text) else "train"].append(text)
    assert len(sides["held"]) > 5
    for side, expected in sides.items():
        assert decoded(cached, side, tokenizer) == expected
        ids, totals = stream(cached, side), cached.manifest.total(side)
        assert totals.tokens == len(ids) and totals.documents == len(expected)
        assert totals.bytes == sum(len(text.encode()) for text in expected)
        ends = 0 if cached.marks.end is None else (ids == cached.marks.end).sum()
        assert ends == (len(expected) if kind in ("bos", "wide") else 0)
    lengths = [len(text.encode()) for text in sides["held"]]
    assert cached.manifest.held_lengths() == lengths
    assert len(cached.manifest.shards) > 10


def test_control_tokens_in_text_are_text(tmp_path):
    texts = [f"<|endoftext|>{i}" for i in range(20)]
    cached = build(tmp_path, write_texts(tmp_path / "c", texts))
    totals = cached.manifest.total("train") + cached.manifest.total("held")
    assert totals.documents == 20
    assert totals.tokens == totals.bytes + 20


def test_equal_documents_share_a_side(tmp_path):
    texts = make_texts(40)
    once = build(tmp_path, write_texts(tmp_path / "a", texts))
    twice = build(tmp_path, write_texts(tmp_path / "b", texts + texts))
    for side in ("train", "held"):
        expected = sorted(decoded(once, side, byte_tokenizer()) * 2)
        assert sorted(decoded(twice, side, byte_tokenizer())) == expected


def test_units_are_neighbours_up_to_a_size_in_order(corpus):
    items = [
        document_readers.SourceFile(f"{n}", Path(f"{n}"), size)
        for n, size in enumerate([1000, 2000, 1500, 9000, 10, 3990, 1])
    ]
    units = [[item.size for item in unit] for unit in units_of(items)]
    assert units == [[1000, 2000], [1500], [9000], [10, 3990], [1]]


def test_a_finished_cache_is_opened_without_reading_the_inputs(
    tmp_path, corpus, monkeypatch
):
    for path in corpus.iterdir():
        os.utime(path, (1, 1))
    first = build(tmp_path, corpus)
    monkeypatch.setattr(TextSource, "read", lambda *_: 1 / 0)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: 1 / 0)
    assert build(tmp_path, corpus).manifest == first.manifest


def test_what_changes_the_ids_changes_the_cache(tmp_path, corpus):
    folders = [build(tmp_path, corpus).folder]
    folders.append(build(tmp_path, corpus, undecodable="replace").folder)
    folders.append(build(tmp_path, corpus, column="other").folder)
    for text in ("aa bb aa bb", "cc dd cc dd"):
        tokenizer = train_bpe(iter([text]), 258)
        folders.append(build(tmp_path, corpus, tokenizer).folder)
    path = corpus / "00003.txt"
    path.write_text("x" + path.read_text()[1:])
    folders.append(build(tmp_path, corpus).folder)
    path.rename(corpus / "00003.md")
    folders.append(build(tmp_path, corpus).folder)
    assert len(set(folders)) == 7


def test_an_edit_of_equal_size_and_time_is_noticed(tmp_path):
    corpus = write_texts(tmp_path / "corpus", make_texts(12))
    path = corpus / "00003.txt"
    os.utime(path, (1, 1))
    first = build(tmp_path, corpus).folder
    path.write_text("x" + path.read_text()[1:])
    os.utime(path, (1, 1))
    second = build(tmp_path, corpus).folder
    other = tmp_path / "other"
    other.write_text("y" + path.read_text()[1:])
    os.utime(other, (1, 1))
    other.replace(path)
    assert len({first, second, build(tmp_path, corpus).folder}) == 3


def test_the_memo_of_hashes_may_be_lost_or_broken(tmp_path, corpus):
    for path in corpus.iterdir():
        os.utime(path, (1, 1))
    first = build(tmp_path, corpus).folder
    memo = tmp_path / "cache" / source_fingerprint.MEMO
    assert len(json.loads(memo.read_text())) == 120
    for broken in ("", "[]", '{"a": 3}', "{"):
        memo.write_text(broken)
        assert build(tmp_path, corpus).folder == first


KILLED = """
import os, pathlib, sys, time
from research.data.text import document_readers, token_cache
from text_helpers import build
document_readers.PIECE_BYTES, token_cache.SHARD_BYTES = 200, 1500
token_cache.UNIT_BYTES = 4000
fsync, place = os.fsync, pathlib.Path(sys.argv[1])
def sync(handle):  # Room to be killed in; the last shards wait for that.
    time.sleep(0.004)
    while len([*place.glob("cache/tokens/*/u*.json")]) > int(sys.argv[3]):
        time.sleep(0.1)
    fsync(handle)
os.fsync = sync
build(place, sys.argv[2])
"""


def killed_build(tmp_path, corpus, shards):
    """Kills a build once so many shards are there; returns what they were."""
    here = Path(__file__).parent
    paths = (here, here.parent / "support", here.parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(corpus), str(shards)],
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
    )
    pattern = "tokens/*/u*.json"
    cache = tmp_path / "cache"
    wait_until(
        lambda: len([*cache.glob(pattern)]) >= shards or child.poll() is not None
    )
    child.kill()
    assert child.wait() == -signal.SIGKILL
    kept = list((tmp_path / "cache").glob(pattern))
    return {path.with_suffix(s) for path in kept for s in (".json", ".train.u16")}


@pytest.mark.parametrize("shards", [1, 9])
def test_a_killed_build_goes_on_where_it_was(tmp_path, corpus, shards):
    unbroken = build(tmp_path / "unbroken", corpus)
    kept = killed_build(tmp_path, corpus, shards)
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in kept}
    folder = next((tmp_path / "cache" / "tokens").iterdir())
    assert not (folder / "manifest.json").exists()
    (folder / f".half-written.{0:032x}.tmp").write_bytes(b"from a writer that died")
    resumed = build(tmp_path, corpus)
    assert len(before) >= 2 * shards
    for path, (data, inode) in before.items():
        assert path.read_bytes() == data and path.stat().st_ino == inode, "kept"
    assert files_of(resumed) == files_of(unbroken)


@pytest.mark.parametrize("kind", ["reading", "writing", "other text"])
def test_a_failure_keeps_the_finished_shards(tmp_path, monkeypatch, kind):
    corpus = write_texts(tmp_path / "corpus", make_texts(24, longest=80))
    (corpus / "zz").write_text("the last one")
    other = build(tmp_path, write_texts(tmp_path / "other", ["of another run"] * 20))
    kept_by_others = files_of(other)

    def fail(*given):
        names = [getattr(each, "where", getattr(each, "name", "")) for each in given]
        if "zz" in names or (kind == "writing" and given[1].number > 1):
            raise OSError(28, "No space left on device")
        return real(*given)

    place, name = {
        "reading": (document_readers, "read_chunks"),
        "writing": (token_cache, "write_shard"),
        "other text": (token_cache.DocumentMarks, "frame"),
    }[kind]
    real = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(UserError):
            build(tmp_path, corpus)
    (folder,) = set((tmp_path / "cache" / "tokens").iterdir()) - {other.folder}
    kept = {path: path.stat().st_ino for path in folder.glob("u*.json")}
    assert len(kept) > 1 and not (folder / "manifest.json").exists()
    expected = build(tmp_path / "unbroken", corpus)
    assert files_of(build(tmp_path, corpus)) == files_of(expected)
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert files_of(other) == kept_by_others


def test_shards_that_are_kept_are_not_tokenised_again(tmp_path, corpus, monkeypatch):
    cached = build(tmp_path, corpus)
    expected = files_of(cached)
    shards = cached.manifest.shards
    within = next(s for s in shards if s.held_continues and s.number >= 2)
    lost = [shards[2], within, shards[-1]]
    (cached.folder / "manifest.json").unlink()
    for shard in lost:
        (cached.folder / f"{shard.name}.json").unlink()
    seen = []
    encode = Tokenizer.encode_arrays
    monkeypatch.setattr(
        Tokenizer, "encode_arrays",
        lambda self, texts, dtype: seen.extend(texts) or encode(self, texts, dtype),
    )  # fmt: skip
    assert files_of(build(tmp_path, corpus)) == expected
    again = sum((shard.train + shard.held for shard in lost), token_cache.TextTotals())
    assert sum(len(text.encode()) for text in seen) == again.bytes


@pytest.mark.parametrize("damage", ["cut", "gone", "longer", "json", "both"])
def test_a_damaged_shard_is_made_again(tmp_path, corpus, damage):
    cached = build(tmp_path, corpus)
    expected = files_of(cached)
    shard = next(s for s in cached.manifest.shards[4:] if s.train.tokens)
    path = shard.file(cached.folder, "train", cached.manifest.dtype)
    if damage == "gone":
        path.unlink()
    elif damage == "json":
        (cached.folder / f"{shard.name}.json").write_text("{")
        (cached.folder / "manifest.json").write_text("{")
    else:
        data = path.read_bytes()
        path.write_bytes(data + b"xx" if damage == "longer" else data[:-2])
    if damage == "both":
        (cached.folder / "manifest.json").unlink()
    assert files_of(build(tmp_path, corpus)) == expected


def test_a_file_that_shrinks_under_a_reader_is_said(tmp_path, corpus):
    cached = build(tmp_path, corpus)
    tokens = TokenStream(cached, "train")
    shard = cached.manifest.shards[0]
    shard.file(cached.folder, "train", cached.manifest.dtype).write_bytes(b"")
    with pytest.raises(UserError, match=r"shorter than it was.*made again"):
        tokens.read(0, 50)


def in_threads(*calls):
    results, threads = [None] * len(calls), []
    for i, call in enumerate(calls):

        def run(i=i, call=call):
            results[i] = call()

        threads.append(threading.Thread(target=run))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_units(tmp_path, corpus, monkeypatch, processes):
    expected = build(tmp_path / "alone", corpus)
    made = []
    write = token_cache.write_shard

    def noted(folder, shard, *rest):
        made.append((threading.current_thread(), shard.unit))
        write(folder, shard, *rest)

    monkeypatch.setattr(token_cache, "write_shard", noted)
    found = in_threads(
        *(
            lambda i=i: build(tmp_path, corpus, process=(i, processes))
            for i in range(processes)
        )
    )
    for cached in found:
        assert cached.manifest == expected.manifest
    assert files_of(found[0]) == files_of(expected)
    owners = {unit: {thread for thread, u in made if u == unit} for _, unit in made}
    assert all(len(threads) == 1 for threads in owners.values()), "none made twice"


def test_units_of_another_machine_that_died_are_made_by_the_others(
    tmp_path, corpus, monkeypatch
):
    monkeypatch.setattr(token_cache, "PATIENCE", 0.2)
    expected = build(tmp_path / "alone", corpus)
    claims = tmp_path / "cache" / "tokens" / expected.folder.name / "claims"
    claims.mkdir(parents=True)
    for unit in (0, 2):
        (claims / str(unit)).write_text("boot of another machine")
    assert files_of(build(tmp_path, corpus, process=(1, 2))) == files_of(expected)


def test_two_runs_may_build_the_same_cache_at_once(tmp_path, corpus):
    expected = files_of(build(tmp_path / "alone", corpus))
    found = in_threads(*(lambda: build(tmp_path, corpus) for _ in range(4)))
    for cached in found:
        assert files_of(cached) == expected


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, corpus):
    folder = build(tmp_path, corpus).folder
    (folder / "manifest.json").unlink()
    dead, alive = folder / f".a.{10:032x}.tmp", folder / f".b.{11:032x}.tmp"
    dead.write_bytes(b"x")
    with open(alive, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        build(tmp_path, corpus)
        assert alive.exists() and not dead.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, corpus, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written.*cache_dir"):
        build(tmp_path, corpus, cache_dir=str(tmp_path / "file" / "cache"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "write_shard", full)
    with pytest.raises(UserError, match=r"No space left.*make space"):
        build(tmp_path, corpus)


def test_text_that_is_none_is_said(tmp_path):
    folder = write_texts(tmp_path / "c", ["", ""])
    (folder / "image").write_bytes(b"\0\1\2")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no readable text \(dropped: "):
            build(tmp_path, folder)


def test_what_was_left_out_is_counted_once(tmp_path, corpus):
    (corpus / "#image").write_bytes(b"\0\1\2")
    (corpus / "#empty").write_bytes(b"")
    for _ in range(2):
        dropped = build(tmp_path, corpus).manifest.dropped()
        assert dropped.counts == {"binary file": 1, "empty": 1}


def left_out(tmp_path, *sources):
    """The lines of `left_out.txt` of a run that reads these sources."""
    skip = {"bad_lines": "skip", "batch_size": 1}
    config = text_config(tmp_path, *sources, undecodable="skip", data=skip)
    return TextTask(config, byte_tokenizer(), 512, (0, 1)).left_out


def test_each_dropped_document_is_named_with_its_place(tmp_path):
    """Also from the cache, and the rest of a file with a bad row is used."""
    corpus = write_texts(tmp_path / "c", make_texts(20))
    (corpus / "2024").mkdir()
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "image").write_bytes(b"12\0")
    (corpus / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9")
    rows = ['{"text": "first"}', '{"body": "x"}', '{"text": ""}', "{", '{"text": 3}']
    rows += [json.dumps({"text": "the row behind them"})]
    (corpus / "2024" / "rows.jsonl").write_text("\n".join(rows))
    (corpus / "2024" / "table.csv").write_text("a,a\n1,2\n")
    expected = [
        "2024/rows.jsonl:2: no column 'text' for config.text.column; the row has",
        "2024/rows.jsonl:3: empty",
        "2024/rows.jsonl:4: not a JSON object",
        "2024/rows.jsonl:5: text is int, not text",
        "2024/table.csv: table.csv:1: two columns are named 'a'",
        "empty.txt:1: empty",
        "image: byte 2 is zero",
        "latin.txt:3: byte 11 of the file is not UTF-8",
    ]
    for sources in ([f"s={corpus}"], [f"s={corpus}"], [f"s={corpus}", f"t={corpus}"]):
        lines = left_out(tmp_path, *sources)
        names = [f"{s[:1]}: " if len(sources) > 1 else "" for s in sources]
        for start in (name + line for name in names for line in expected):
            assert any(line.startswith(start) for line in lines), (start, lines)
        assert len(lines) == len(names) * len(expected)
    cached = build(tmp_path, corpus, undecodable="skip", data={"bad_lines": "skip"})
    texts = decoded(cached, "train", byte_tokenizer())
    texts += decoded(cached, "held", byte_tokenizer())
    assert any("the row behind them" in text for text in texts)


def test_a_few_places_stand_for_many_and_older_caches_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(dropped_documents, "MOST_NAMED", 3)
    folder = write_texts(tmp_path / "c", [*make_texts(40), *[""] * 9])
    (folder / "z").write_bytes(b"\0")
    named = ["00040.txt:1: empty", "00041.txt:1: empty", "00042.txt:1: empty"]
    lines = [*named, "and 6 more: empty", "z: byte 0 is zero, so this is a binary file"]
    assert left_out(tmp_path, f"s={folder}") == lines
    for path in (tmp_path / "cache").rglob("*.json"):
        values = json.loads(path.read_text())
        for shard in values.get("shards", ()):
            assert not shard.pop("named"), "a manifest has few, however many shards"
        values.pop("named", None)
        path.write_text(json.dumps(values))
    assert left_out(tmp_path, f"s={folder}") == [
        "and 9 more: empty",
        "and 1 more: binary file",
    ]


def test_a_tokenizer_must_tell_documents_apart(tmp_path, corpus):
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    with pytest.raises(UserError, match="names no eos_token"):
        build(tmp_path, corpus, Tokenizer(inner, bos=None, eos=None))
    marks = token_cache.DocumentMarks.of(byte_tokenizer())
    piece = DocumentPiece("text", True, True, "rows.jsonl:3")
    with pytest.raises(
        UserError, match=r"rows\.jsonl:3: .* makes id \d+ of plain text"
    ):
        marks.frame(piece, np.array([1, marks.start, 2]))


def test_an_unreadable_document_stops_the_build(tmp_path, corpus):
    (corpus / "zz").write_bytes(b"text \xff")
    with pytest.raises(UserError, match=r"^zz:1: byte 5 "):
        build(tmp_path, corpus)
    assert build(tmp_path, corpus, undecodable="skip").manifest.dropped().counts
