"""Rows of text that end at paragraphs or overlap, and documents that a mark ends."""

import itertools
import json
import re

import numpy as np
import pytest
from text_helpers import same, take, text_and_data, text_config, with_bos

from research.config.cross_knob_rules import check_effects
from research.config.run_config import Config, DataConfig, TextConfig
from research.core.errors import UserError
from research.data.text import document_readers, streaming, tokenized_corpus
from research.data.text.row_layout import (
    BARE,
    BLANK,
    LINE,
    NO_END,
    DocumentMarks,
    RowLayout,
    line_ends,
)
from research.data.text.text_sources import open_sources
from research.data.text.token_cache import open_cache
from research.data.text.tokenized_corpus import RowSpans, TokenStream, load_text
from research.tokenize.tokenizer_training import byte_tokenizer

PLAIN = byte_tokenizer()
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [PLAIN, with_bos(PLAIN)], ids=["eos", "bos"]
)
MARK = "\n\n\n"
LENGTH = 24


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(document_readers, "PIECE_BYTES", 100)
    monkeypatch.setattr(document_readers, "PART_BYTES", 60)
    monkeypatch.setattr(streaming, "BATCH_BYTES", 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of short and long paragraphs, some of one long line."""
    rng = np.random.default_rng(3)
    place = tmp_path_factory.mktemp("paragraphs")
    (place / "texts").mkdir()
    for number in range(12):
        words = rng.integers(0, 10, rng.integers(1, 120))
        ends = rng.choice([" ", "\n", "\n\n", ""], len(words), p=[0.4, 0.2, 0.2, 0.2])
        text = "".join(f"{w}{e}" for w, e in zip(words, ends, strict=True))
        (place / "texts" / f"{number:02}.txt").write_text(f"{number} {text}")
    return place


def load(folder, tokenizer=PLAIN, *, cut="paragraph", **text):
    config = text_config(
        folder, f"s={folder / 'texts'}", data={"seq_len": LENGTH}, cut=cut, **text
    )
    return load_text(*text_and_data(config), tokenizer)


def stream_of(folder, tokenizer):
    config = text_config(folder, f"s={folder / 'texts'}")
    (source,) = open_sources(*text_and_data(config))
    cached = open_cache(source, tokenizer, config.text)
    return TokenStream(cached, "train"), cached


def rows_of(batch):
    """The ids of each row that it reads, and those that it predicts."""
    for tokens, targets, segments in zip(
        batch.tokens, batch.targets, batch.segments, strict=True
    ):
        real = segments > 0
        yield tokens[real].tolist(), targets[real].tolist()


def is_good(ids, start):
    """Whether a row may end behind these ids, before `start` if that comes next."""
    text = re.sub(r"[^\S\n]", "", PLAIN.decode(ids))
    return text.endswith("\n\n") or start


@TOKENIZERS
@pytest.mark.parametrize("overlap", [0, 5])
def test_rows_end_at_paragraphs_and_every_id_is_predicted(folder, tokenizer, overlap):
    data = load(folder, tokenizer, overlap=overlap)
    rows = list(rows_of(data.first_rows(data.rows)))
    stream, _ = stream_of(folder, tokenizer)
    ids, mark = stream.read(0, len(stream)).tolist(), DocumentMarks.of(tokenizer).start
    assert rows[0][0][0] == ids[0]
    lengths = [len(targets) for _, targets in rows]
    assert data.counted.row_lengths().tolist() == lengths
    again = [targets[overlap if i else 0 :] for i, (_, targets) in enumerate(rows)]
    assert list(itertools.chain(*again)) == ids[1:]
    for (before, targets), (tokens, _) in itertools.pairwise(rows):
        assert tokens[: overlap + 1] == targets[-overlap - 1 :]
        assert LENGTH // 2 < len(before) <= LENGTH
    ends = [is_good(x, y[-1] == mark) for x, y in rows[:-1]]
    full = [len(x) == LENGTH for x, _ in rows[:-1]]
    lines = [PLAIN.decode(x).endswith("\n") for x, _ in rows]
    assert sum(ends) > len(ends) / 3
    assert all(map(any, zip(ends, full, lines, strict=False)))


def test_the_last_possible_place_is_chosen_before_a_worse_one():
    ends = line_ends(PLAIN)
    marks = DocumentMarks.of(PLAIN)
    layout = RowLayout(10, True, marks, 0, ends)

    def cut(text):
        return layout.predictions(np.array(PLAIN.encode_texts([text])[0]))

    assert cut("12345678\n\n1") == 10  # An empty line at the very end.
    assert cut("123456\n\n901") == 8
    assert cut("123456\n8\n01") == 9, "a line end, as there is no empty line"
    assert cut("12345\n\n8\n01") == 7, "an empty line before a line end"
    assert cut("1\n\n45678901") == 10, "that row would be too short"
    assert cut("12345678") == 7, "here the stream ends"
    letters = PLAIN.encode_texts(["1234567", "123"])
    ids = np.array([*letters[0], marks.start, *letters[1]])
    assert layout.predictions(ids) == 7, "the next row begins with its document"
    assert RowLayout(10, True, marks).predictions(ids) == 10


def test_line_ends_are_those_of_whole_tokens():
    class Words:
        largest_id = 5
        words = ("x", "x \n", "\n", ".\n\n", " \n", "\n\n\n")

        def decode(self, ids):
            return self.words[ids[0]]

    assert line_ends(Words()).tolist() == [NO_END, LINE, BARE, BLANK, BARE, BLANK]


@pytest.mark.parametrize("cut", ["paragraph", "anywhere"])
@pytest.mark.parametrize("overlap", [0, 7])
def test_streamed_rows_are_the_cached_ones(folder, cut, overlap):
    cached = load(folder, cut=cut, overlap=overlap)
    count = cached.rows // 2 * 2 - 2
    expected = list(rows_of(cached.first_rows(count)))
    streamed = load(folder, cut=cut, overlap=overlap, cache=False)
    batches = take(streamed.train_iterator(2, 0), count // 2)
    assert list(itertools.chain(*map(rows_of, batches))) == expected


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("text", [{"overlap": 7}, {"hard_cut": r"\n\n"}])
def test_a_restored_position_continues_bit_for_bit(folder, cache, text):
    iterator = load(folder, cache=cache, **text).train_iterator(2, 0)
    states = []
    for _ in range(12):
        states.append(json.loads(json.dumps(iterator.get_state())))
        next(iterator)
    expected = take(iterator, 3)
    for number in (0, 1, 5, 11):
        fresh = load(folder, cache=cache, **text).train_iterator(2, 0)
        fresh.set_state(states[number])
        assert all(map(same, take(fresh, 15 - number)[-3:], expected))


def test_the_ends_of_rows_are_found_once(folder, monkeypatch):
    stream, cached = stream_of(folder, PLAIN)
    layout = RowLayout(LENGTH, True, cached.marks, 3, line_ends(PLAIN))
    first = list(RowSpans(stream, layout, cached.folder))
    monkeypatch.setattr(tokenized_corpus, "_row_ends", None)
    assert list(RowSpans(stream, layout, cached.folder)) == first
    (file,) = cached.folder.glob("row-ends-24-3.npy")
    file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.undo()
    assert list(RowSpans(stream, layout, cached.folder)) == first


# -- documents that a mark ends ------------------------------------------------------


def texts_with_marks():
    rng = np.random.default_rng(4)
    for _ in range(30):
        parts = rng.choice(["word ", "\n", MARK, "x" * 130], rng.integers(1, 60))
        yield "".join(parts)


@pytest.mark.parametrize("kind", ["file", "folder", "rows"])
def test_a_mark_ends_documents_wherever_pieces_are_cut(tmp_path, kind):
    for number, text in enumerate(texts_with_marks()):
        place = tmp_path / str(number)
        place.mkdir()
        path = place / ("a.jsonl" if kind == "rows" else "a.txt")
        path.write_text(json.dumps({"text": text}) if kind == "rows" else text)
        where = place if kind == "folder" else path
        config = text_config(tmp_path, f"s={where}", hard_cut=r"\n\n\n")
        (source,) = open_sources(*text_and_data(config))
        pieces = list(source.read(source.files))
        found = [""]
        for piece in pieces:
            found[-1] += piece.text
            found += [""] if piece.ends else []
        assert found.pop() == ""
        # Where line ends beyond a mark stand depends on the pieces.
        assert [x.strip("\n") for x in found if x.strip("\n")] == [
            x.strip("\n") for x in text.split(MARK) if x.strip("\n")
        ]
        assert all(p.starts for p in pieces[:1])
        for before, after in itertools.pairwise(pieces):
            assert before.ends == after.starts
        for index, piece in enumerate(pieces):
            again = list(source.read(source.files, start=piece.place))
            assert [(p.text, p.starts, p.ends) for p in again[piece.place.skip :]] == [
                (p.text, p.starts, p.ends) for p in pieces[index:]
            ]


def test_a_source_without_a_mark_keeps_its_cache(folder):
    keys = set()
    for hard_cut in ("", "\n\n", r"\n\n", MARK):
        config = text_config(folder, f"s={folder / 'texts'}", hard_cut=hard_cut)
        (source,) = open_sources(*text_and_data(config))
        keys.add(open_cache(source, PLAIN, config.text).manifest.key)
    assert len(keys) == 3 and stream_of(folder, PLAIN)[1].manifest.key in keys


def test_knobs_of_text_are_refused_where_they_cannot_act():
    for knob, value in [("cut", "paragraph"), ("overlap", 8), ("hard_cut", "##")]:
        config = Config(text=TextConfig(**{knob: value}))
        with pytest.raises(UserError, match=rf"config.text.{knob} is .* no effect"):
            check_effects(config, Config())
    data = DataConfig(kind="text", seq_len=16)
    with pytest.raises(UserError, match="less than half a row"):
        Config(data=data, text=TextConfig(sources=("s=x",), overlap=8))
