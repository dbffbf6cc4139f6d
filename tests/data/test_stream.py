"""Streamed rows are the cached ones in the order of the source, from any place."""

import collections
import json

import numpy as np
import pytest
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
from research.data.text import document_readers, streaming
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
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_texts(folder / "a", make_texts(50, seed=1))
    write_texts(folder / "b", make_texts(20, seed=2))
    return folder


def config_of(place, names="ab", cache=False, **text):
    sources = (f"{n}={place / n}" for n in names)
    return text_config(place, *sources, cache=cache, **text)


def load(place, names="ab", tokenizer=PLAIN, **text):
    return load_text(*text_and_data(config_of(place, names, **text)), tokenizer)


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["eos", "bos"])
def test_the_stream_is_the_cached_one_again_and_again(place, tokenizer):
    config = config_of(place, "a")
    (source,) = open_sources(*text_and_data(config))
    cached = TokenStream(open_cache(source, tokenizer, config.text), "train")
    ids = cached.read(0, len(cached))
    count = 2 * len(ids) // (4 * 32)
    batches = take(load(place, "a", tokenizer).train_iterator(4, 0), count)
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    twice = np.concatenate([ids, ids, ids])
    np.testing.assert_array_equal(tokens, twice[: len(tokens)])
    np.testing.assert_array_equal(targets, twice[1 : len(tokens) + 1])


@pytest.mark.parametrize("mixture", [(), ("a=1", "b=4")])
@pytest.mark.parametrize("taken", [0, 1, 7, 60])
def test_a_restored_position_continues_bit_for_bit(place, taken, mixture):
    iterator = load(place, mixture=mixture).train_iterator(4, 0)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    fresh = load(place, mixture=mixture).train_iterator(4, 0)
    take(fresh, 3)
    fresh.set_state(state)
    assert all(map(same, take(fresh, 30), expected))
    assert fresh.get_state() == iterator.get_state()


def test_what_lies_before_a_position_is_not_tokenised(place, monkeypatch):
    iterator = load(place, "a").train_iterator(4, 0)
    take(iterator, 30)
    state = iterator.get_state()
    index = state["positions"][0][1]
    (source,) = open_sources(*text_and_data(config_of(place, "a")))
    pieces = [p.text for p in source.read(source.files, collections.Counter())]
    fresh = load(place, "a").train_iterator(4, 0)
    seen = []
    encode = Tokenizer.encode_arrays
    monkeypatch.setattr(
        Tokenizer, "encode_arrays",
        lambda self, texts, dtype: seen.extend(texts) or encode(self, texts, dtype),
    )  # fmt: skip
    fresh.set_state(state)
    next(fresh)
    assert index > 20 and seen[0] == pieces[index]
    assert not set(seen) & set(pieces[:index])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batch_of_one(place, processes):
    data = load(place)
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
def test_sources_take_turns_by_their_weights(place, mixture, share):
    data = load(place, mixture=mixture)
    batches = take(data.train_iterator(4, 0), 60)
    groups = np.concatenate([batch.groups[:, 0] for batch in batches])
    if share is None:
        sizes = [
            sum(path.stat().st_size for path in (place / name).iterdir())
            for name in "ab"
        ]
        share = sizes[1] / sum(sizes)
    running = np.cumsum(groups) - share * np.arange(1, len(groups) + 1)
    assert np.abs(running).max() < 1


@pytest.mark.parametrize("limit", [1, 400, 10**9])
def test_the_same_documents_are_evaluated_as_from_the_cache(place, limit):
    streamed = load(place, held_out_bytes=limit)
    cached = load_text(
        *text_and_data(config_of(place, cache=True, held_out_bytes=limit)), PLAIN
    )
    assert streamed.held_out_bytes == cached.held_out_bytes
    batches = streamed.held_out_batches(4), cached.held_out_batches(4)
    assert all(map(same, *batches)) and len(batches[0]) == len(batches[1])
    assert not streamed.train and streamed.rows == 0


def test_the_search_for_held_out_documents_ends(place, monkeypatch):
    monkeypatch.setattr(streaming, "SEARCH_BYTES", 500)
    monkeypatch.setattr(streaming, "SEARCH_FACTOR", 0)
    read = []
    pieces = streaming.TextSource.read
    monkeypatch.setattr(
        streaming.TextSource, "read",
        lambda *args: (read.append(p) or p for p in pieces(*args)),
    )  # fmt: skip
    with pytest.raises(UserError, match="held_out_share"):
        load(place, "a", held_out_share=1e-6)
    assert sum(len(piece.text) for piece in read) < 1500


def test_text_without_anything_to_train_on_is_said(tmp_path):
    held = (t for t in make_texts(50, longest=5) if is_held_out(piece_of(t), 0.5))
    write_texts(tmp_path / "a", [next(held)])
    data = load(tmp_path, "a", held_out_share=0.5)
    with pytest.raises(UserError, match="no text to train on"):
        next(data.train_iterator(4, 0))


def piece_of(text):
    return document_readers.DocumentPiece(text, True, True, "")


def test_the_data_says_what_it_is(place):
    data = load(place)
    assert data.groups == ["a", "b"] and "streamed" in data.origin
    assert load(place).sha256 == data.sha256 != load(place, "a").sha256
    first = data.sample_batch(2)
    assert first.tokens.shape == (2, 32) and first.segments.all()
