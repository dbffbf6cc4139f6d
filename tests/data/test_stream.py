"""Streamed rows are the cached ones in the order of the source, from any place."""

import collections
import csv
import gzip
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from text_helpers import (
    FIELDS,
    make_texts,
    same,
    take,
    text_and_data,
    text_config,
    with_bos,
    write_texts,
)

from research.core.errors import UserError
from research.data import row_readers
from research.data.source_shares import share_division
from research.data.text import document_readers, streaming, text_dataset
from research.data.text.row_layout import is_held_out
from research.data.text.text_sources import open_sources
from research.data.text.token_cache import open_cache
from research.data.text.tokenized_corpus import TokenStream, load_text
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import byte_tokenizer

PLAIN = byte_tokenizer()
MARKED = with_bos(PLAIN)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 100)
    monkeypatch.setattr(streaming, "BATCH_BYTES", 300)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_texts(folder / "a", make_texts(50, seed=1))
    write_texts(folder / "b", make_texts(20, seed=2))
    return folder


def config_of(small, names="ab", cache=False, **text):
    sources = (f"{n}={small / n}" for n in names)
    return text_config(small, *sources, cache=cache, **text)


def load(small, names="ab", tokenizer=PLAIN, **text):
    return load_text(*text_and_data(config_of(small, names, **text)), tokenizer)


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["eos", "bos"])
def test_the_stream_is_the_cached_one_again_and_again(small, tokenizer):
    config = config_of(small, "a")
    (source,) = open_sources(*text_and_data(config))
    cached = TokenStream(open_cache(source, tokenizer, config.text), "train")
    ids = cached.read(0, len(cached))
    count = 2 * len(ids) // (4 * 32)
    batches = take(load(small, "a", tokenizer).train_iterator(4, 0), count)
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    twice = np.concatenate([ids, ids, ids])
    np.testing.assert_array_equal(tokens, twice[: len(tokens)])
    np.testing.assert_array_equal(targets, twice[1 : len(tokens) + 1])


@pytest.mark.parametrize("mixture", [(), ("a=1", "b=4")])
@pytest.mark.parametrize("taken", [0, 1, 7, 60])
def test_a_restored_position_continues_bit_for_bit(small, taken, mixture):
    iterator = load(small, mixture=mixture).train_iterator(4, 0)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    fresh = load(small, mixture=mixture).train_iterator(4, 0)
    take(fresh, 3)
    fresh.set_state(state)
    assert all(map(same, take(fresh, 30), expected))
    assert fresh.get_state() == iterator.get_state()


def test_what_lies_before_a_position_is_not_tokenised(small, monkeypatch):
    iterator = load(small, "a").train_iterator(4, 0)
    take(iterator, 30)
    state = iterator.get_state()
    ((position,),) = state["positions"]
    (source,) = open_sources(*text_and_data(config_of(small, "a")))
    pieces = [p.text for p in source.read(source.files, collections.Counter())]
    before = source.files[: position[1]]
    index = len(list(source.read(before, collections.Counter())))
    fresh = load(small, "a").train_iterator(4, 0)
    seen = []
    encode = Tokenizer.encode_arrays
    monkeypatch.setattr(
        Tokenizer, "encode_arrays",
        lambda self, texts, dtype: seen.extend(texts) or encode(self, texts, dtype),
    )  # fmt: skip
    fresh.set_state(state)
    next(fresh)
    assert index > 20 and seen[0] in pieces[index : index + 3]
    assert not set(seen) & set(pieces[:index])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batch_of_one(small, processes):
    data = load(small)
    local = 8 // processes
    parts = [
        data.train_iterator(8, 0, range(i * local, (i + 1) * local))
        for i in range(processes)
    ]
    whole = data.train_iterator(8, 0)
    for _ in range(6):
        pieces = [next(part) for part in parts]
        expected = next(whole)
        for field in FIELDS:
            together = np.concatenate([getattr(piece, field) for piece in pieces])
            np.testing.assert_array_equal(together, getattr(expected, field))


@pytest.mark.parametrize("mixture, share", [(("a=1", "b=3"), 0.75), ((), None)])
def test_sources_take_turns_by_their_weights(small, mixture, share):
    data = load(small, mixture=mixture)
    batches = take(data.train_iterator(4, 0), 60)
    groups = np.concatenate([batch.groups[:, 0] for batch in batches])
    if share is None:
        sizes = [
            sum(path.stat().st_size for path in (small / name).iterdir())
            for name in "ab"
        ]
        share = sizes[1] / sum(sizes)
    running = np.cumsum(groups) - share * np.arange(1, len(groups) + 1)
    assert np.abs(running).max() < 1


@pytest.mark.parametrize("limit", [1, 400, 10**9])
def test_the_same_documents_are_evaluated_as_from_the_cache(small, limit):
    streamed = load(small, held_out_bytes=limit)
    cached = load_text(
        *text_and_data(config_of(small, cache=True, held_out_bytes=limit)), PLAIN
    )
    assert streamed.held_out_bytes == cached.held_out_bytes
    batches = [*streamed.held_out_batches(4)], [*cached.held_out_batches(4)]
    assert all(map(same, *batches)) and len(batches[0]) == len(batches[1])
    assert not streamed.train and streamed.rows == 0


def test_the_search_for_held_out_documents_ends(small, monkeypatch):
    monkeypatch.setattr(streaming, "SEARCH_BYTES", 500)
    monkeypatch.setattr(streaming, "SEARCH_FACTOR", 0)
    monkeypatch.setattr(text_dataset, "SEARCHED", 5)
    read = []
    pieces = streaming.TextSource.read
    monkeypatch.setattr(
        streaming.TextSource, "read",
        lambda *args: (read.append(p) or p for p in pieces(*args)),
    )  # fmt: skip
    with pytest.raises(UserError, match="held_out_share"):
        load(small, "a", held_out_share=1e-6)
    assert sum(len(piece.text) for piece in read) < 1500


def test_text_without_anything_to_train_on_is_said(tmp_path):
    held = (t for t in make_texts(50, longest=5) if is_held_out(piece_of(t), 0.5))
    write_texts(tmp_path / "a", [next(held)])
    data = load(tmp_path, "a", held_out_share=0.5)
    with pytest.raises(UserError, match="no text to train on"):
        next(data.train_iterator(4, 0))


def piece_of(text):
    return document_readers.DocumentPiece(text, True, True, "")


def test_the_data_says_what_it_is(small):
    data = load(small)
    assert data.groups == ["a", "b"] and "streamed" in data.origin
    assert load(small).sha256 == data.sha256 != load(small, "a").sha256
    first = data.sample_batch(2)
    assert first.tokens.shape == (2, 32) and first.segments.all()


FORMATS = [
    "jsonl",
    "jsonl.gz",
    "csv",
    "json",
    "parquet",
    "array_record",
    "txt",
    "txt.zst",
]


def write_corpus(path, texts):
    """The texts as the documents of one file of the kind that its name says."""
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    kind = path.name.split(".", 1)[1]
    if kind == "array_record":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(text.encode())
        writer.close()
    elif kind == "parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *(r.values() for r in rows)])
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        lines = [json.dumps(row) for row in rows] if "jsonl" in kind else texts
        data = "".join(f"{line}\n" for line in lines).encode()
        if kind.endswith("gz"):
            data = gzip.compress(data)
        if kind.endswith("zst"):
            data = pyarrow.Codec("zstd").compress(data, asbytes=True)
        path.write_bytes(data)
    return path


@pytest.fixture
def small_parts(monkeypatch):
    """A source of some kilobytes counts as large."""
    monkeypatch.setattr(streaming, "PART_BYTES", 500)
    monkeypatch.setattr(document_readers, "PART_BYTES", 60)


def load_file(path, **text):
    text = {"cache": False, "held_out_bytes": 1, "held_out_share": 0.1} | text
    config = text_config(path.parent, f"s={path}", **text)
    return load_text(*text_and_data(config), PLAIN)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_position_in_any_kind_of_file_continues_bit_for_bit(
    tmp_path, small_parts, kind
):
    path = write_corpus(tmp_path / f"rows.{kind}", make_texts(120, seed=3))
    iterator = load_file(path).train_iterator(8, 0)
    for _ in range(6):
        take(iterator, 5)
        state = json.loads(json.dumps(iterator.get_state()))
        fresh = load_file(path).train_iterator(8, 0)
        fresh.set_state(state)
        expected = take(iterator, 3)
        assert all(map(same, take(fresh, 3), expected))
        assert json.loads(json.dumps(fresh.get_state())) == json.loads(
            json.dumps(iterator.get_state())
        )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record", "txt"])
@pytest.mark.parametrize("processes", [1, 4])
def test_a_process_reads_only_its_share_of_a_large_file(
    tmp_path, small_parts, monkeypatch, kind, processes
):
    path = write_corpus(tmp_path / f"rows.{kind}", make_texts(400, seed=4))
    data = load_file(path)
    read = document_readers.TextSource.read
    seen = collections.Counter()

    def noted(source, files, **rest):
        for piece in read(source, files, **rest):
            seen[piece.text] += 1
            yield piece

    whole = take(data.train_iterator(8, 0), 4)
    monkeypatch.setattr(document_readers.TextSource, "read", noted)
    local, texts, parts = 8 // processes, [], []
    for i in range(processes):
        seen.clear()
        mine = range(i * local, (i + 1) * local)
        parts.append(take(data.train_iterator(8, 0, mine), 4))
        texts.append(set(seen))
    for one, *others in zip(whole, *parts, strict=True):
        tokens = np.concatenate([part.tokens for part in others])
        np.testing.assert_array_equal(tokens, one.tokens)
    if processes > 1:
        assert not set.intersection(*texts)
        assert sum(map(len, texts)) == len(set.union(*texts)), "nothing is read twice"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record", "txt", "shelf"])
def test_the_shares_hold_every_document_once(tmp_path, small_parts, kind):
    texts = make_texts(300, seed=5)
    if kind == "shelf":
        path = write_texts(tmp_path / "shelf", texts)
    else:
        path = write_corpus(tmp_path / f"rows.{kind}", texts)
    config = text_config(tmp_path, f"s={path}")
    (source,) = open_sources(*text_and_data(config))
    deal = share_division.choose_deal(source, 8, 500)
    assert deal.count == 8
    shares = share_division.deal_shares(source, deal)
    found = collections.Counter()
    for share in shares:
        pieces = source.read(share, collections.Counter())
        numbers = re.findall(r"(?m)^(\d+): ", "\n".join(p.text for p in pieces))
        assert len(numbers) > 20
        found.update(numbers)
    assert found == collections.Counter(map(str, range(300)))
    sizes = [sum(item.size for item in share) for share in shares]
    assert min(sizes) > 0.8 * max(sizes)


def test_a_resume_parses_no_row_before_its_place(tmp_path, small_parts, monkeypatch):
    path = write_corpus(tmp_path / "rows.jsonl", make_texts(400, seed=6))
    iterator = load_file(path).train_iterator(1, 0)
    take(iterator, 300)
    state = iterator.get_state()
    fresh = load_file(path).train_iterator(1, 0)
    expected, parsed = next(iterator), []
    parse = row_readers._parse_json_row
    monkeypatch.setattr(
        row_readers, "_parse_json_row", lambda *a: parsed.append(a) or parse(*a)
    )
    fresh.set_state(state)
    assert same(next(fresh), expected) and len(parsed) < 60


def test_positions_of_older_runs_are_understood(small):
    """They were `[pass, piece, id]` by source, with pieces counted from its start."""
    data = load(small)
    iterator = data.train_iterator(4, 0)
    take(iterator, 30)
    state = iterator.get_state()
    old = []
    for source, ((turn, item, at, _, skip, offset),) in zip(
        open_sources(*text_and_data(config_of(small))), state["positions"], strict=True
    ):
        before = source.read(source.files[:item], collections.Counter())
        inside = source.read([source.files[item]], collections.Counter())
        here = [piece.place for piece in inside]
        number = next(i for i, small in enumerate(here) if small.at == at)
        old.append([turn, len(list(before)) + number + skip, offset])
    alive = []
    fresh = load(small).train_iterator(4, 0)
    fresh.alive = lambda: alive.append(1)
    fresh.set_state({"rows": state["rows"], "positions": old})
    assert all(map(same, take(fresh, 30), take(iterator, 30)))
    assert len(alive) > sum(n for _, n, _ in old), "a sign of life for every piece"


def test_a_position_is_joined_from_those_of_all_processes(tmp_path, small_parts):
    path = write_corpus(tmp_path / "rows.jsonl", make_texts(300, seed=7))
    data = load_file(path)
    whole = data.train_iterator(8, 0)
    parts = [data.train_iterator(8, 0, range(i, i + 4)) for i in (0, 4)]
    for each in (whole, *parts):
        take(each, 5)
    known = [json.dumps(p) for p in whole.get_state()["positions"][0]]
    states, asked = [part.get_state() for part in parts], []

    def union(texts):
        asked.append(texts)
        return known

    joined, _ = (part.joined(s, union) for part, s in zip(parts, states, strict=True))
    assert joined == json.loads(json.dumps(whole.get_state()))
    assert [a or b for a, b in zip(*asked, strict=True)] == known
    assert None in parts[0].get_state()["positions"][0]
    fresh = load_file(path).train_iterator(8, 0, range(2, 4))
    fresh.set_state(joined)
    (expected,) = take(whole, 1)
    np.testing.assert_array_equal(next(fresh).tokens, expected.tokens[2:4])


def test_sources_that_alternate_are_drawn_from_all_their_shares(tmp_path, small_parts):
    for name in "ab":
        texts = make_texts(200, seed=ord(name))
        write_corpus(tmp_path / f"{name}.jsonl", texts)
    sources = [f"{name}={tmp_path / name}.jsonl" for name in "ab"]
    config = text_config(
        tmp_path, *sources, cache=False, held_out_bytes=1, mixture=("a=1", "b=1")
    )
    iterator = load_text(*text_and_data(config), PLAIN).train_iterator(8, 0)
    take(iterator, 16)
    for shares in iterator.get_state()["positions"]:
        assert len(shares) > 2 and all(
            place[1:] != [0, None, 0, 0, 0] for place in shares
        )


def test_a_batch_that_the_shares_do_not_divide_is_refused(tmp_path, small_parts):
    path = write_corpus(tmp_path / "rows.jsonl", make_texts(300, seed=7))
    state = load_file(path).train_iterator(8, 0).get_state()
    with pytest.raises(UserError, match=r"in 8 shares; config\.data\.batch_size"):
        load_file(path).train_iterator(6, 0).set_state(state)
