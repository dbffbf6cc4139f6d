"""Rows are the stream, cut; every epoch has each once; held-out text stays out."""

import dataclasses
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

from research.config.data_knobs import BY_SIZE
from research.config.run_config import Config, DataConfig, TextConfig
from research.core.errors import UserError
from research.data.text import token_cache, tokenized_corpus
from research.data.text.document_readers import DocumentPiece
from research.data.text.row_layout import DocumentMarks, lay_rows
from research.data.text.text_sources import check_text, open_sources
from research.data.text.token_cache import open_cache
from research.data.text.tokenized_corpus import TokenStream, load_text
from research.tasks.epochs import count_epochs
from research.tokenize.tokenizer_training import byte_tokenizer

PLAIN = byte_tokenizer()
MARKED = with_bos(PLAIN)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two sources of several shards, tokenised once."""
    folder = tmp_path_factory.mktemp("corpora")
    write_texts(folder / "a", make_texts(150, seed=1))
    write_texts(folder / "b", make_texts(60, seed=2))
    return folder


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(token_cache, "SHARD_BYTES", 5000)
    monkeypatch.setattr(token_cache, "UNIT_BYTES", 20_000)


def config_of(small, names="ab", data=None, **text):
    return text_config(small, *(f"{n}={small / n}" for n in names), data=data, **text)


def load(small, names="ab", tokenizer=PLAIN, data=None, **text):
    return load_text(*text_and_data(config_of(small, names, data, **text)), tokenizer)


def streams(small, names="ab", side="train", tokenizer=PLAIN, **text):
    config = config_of(small, names, **text)
    found = []
    for source in open_sources(*text_and_data(config)):
        tokens = TokenStream(open_cache(source, tokenizer, config.text), side)
        found.append(tokens.read(0, len(tokens)))
    return found


def rows_in(batches):
    """Each row's tokens and targets, as bytes."""
    return [
        tokens.tobytes() + targets.tobytes()
        for batch in batches
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
    ]


def rows_of(small, names="ab"):
    """All rows there should be, as in `rows_in`."""
    rows = []
    for ids in streams(small, names):
        for start in range(0, len(ids) - 32, 32):
            row = ids[start : start + 33].astype(np.int32)
            rows.append(row[:-1].tobytes() + row[1:].tobytes())
    return rows


def test_a_stream_is_read_at_any_place(small):
    (whole,) = streams(small, "a")
    config = config_of(small, "a")
    (source,) = open_sources(*text_and_data(config))
    cached = open_cache(source, PLAIN, config.text)
    assert len(cached.manifest.shards) > 3
    tokens = TokenStream(cached, "train")
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, end = np.sort(rng.integers(0, len(tokens) + 1, 2))
        part = tokens.read(int(start), int(end - start))
        np.testing.assert_array_equal(part, whole[start:end])
    for start, count in ((-1, 1), (0, len(tokens) + 1), (len(tokens), 1)):
        with pytest.raises(ValueError):
            tokens.read(start, count)


def test_few_files_are_open_at_a_time(small, monkeypatch):
    monkeypatch.setattr("research.data.text.tokenized_corpus.OPEN_FILES", 2)
    config = config_of(small, "a")
    (source,) = open_sources(*text_and_data(config))
    tokens = TokenStream(open_cache(source, PLAIN, config.text), "train")
    whole = tokens.read(0, len(tokens))
    for start in (len(tokens) - 9, 0, len(tokens) // 2, 5):
        np.testing.assert_array_equal(tokens.read(start, 9), whole[start : start + 9])
    assert len(tokens._handles) == 2


def expected_row(ids, marks, isolate, length):
    """The expected row, computed token by token."""
    fields = {field: [] for field in FIELDS[:5]}
    segment, position = 1, 0
    for i in range(len(ids) - 1):
        if isolate and i and ids[i] == marks.start:
            segment, position = segment + 1, 0
        crosses = isolate and marks.end is not None and ids[i + 1] == marks.start
        values = (ids[i], ids[i + 1], 0 if crosses else 1, segment, position)
        for field, value in zip(FIELDS, values, strict=False):
            fields[field].append(value if i < length else 0)
        position += 1
    return fields


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["eos", "bos"])
def test_rows_say_where_documents_begin(tokenizer, isolate):
    marks = DocumentMarks.of(tokenizer)
    rng = np.random.default_rng(0)
    pieces = [DocumentPiece("x", True, True, "")] * 200
    documents = [
        marks.frame(p, rng.integers(0, 200, rng.integers(1, 9))) for p in pieces
    ]
    stream = np.concatenate(documents)
    ids = np.stack([stream[at : at + 17] for at in range(40)])
    lengths = rng.choice([16, 16, 0, 5], 40)
    groups = rng.integers(0, 3, 40)
    batch = lay_rows(ids.astype("<u2"), lengths, groups, marks, isolate)
    for i in range(40):
        expected = expected_row(ids[i], marks, isolate, lengths[i])
        for field, values in expected.items():
            np.testing.assert_array_equal(getattr(batch, field)[i], values, field)
        shown = [groups[i]] * lengths[i] + [0] * (16 - lengths[i])
        np.testing.assert_array_equal(batch.groups[i], shown)
    for field in FIELDS:
        dtype = np.float32 if field == "weights" else np.int32
        assert getattr(batch, field).dtype == dtype


@pytest.mark.parametrize("batch_size", [1, 7])
def test_every_epoch_has_each_row_once_in_another_order(small, batch_size):
    whole = rows_of(small)
    data = load(small)
    assert data.rows == len(whole) > 200
    batches = take(data.train_iterator(batch_size, 0), 3 * len(whole) // batch_size + 1)
    rows = rows_in(batches)
    epochs = [rows[i * len(whole) : (i + 1) * len(whole)] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(whole)
    assert len({tuple(epoch) for epoch in (whole, *epochs)}) == 4
    groups = {row: int(b.groups[0, 0]) for b in batches for row in rows_in([b])[:1]}
    only_b = set(rows_of(small, "b")) - set(rows_of(small, "a"))
    assert all(group == (row in only_b) for row, group in groups.items())


def test_the_order_depends_on_the_seed_alone(small):
    first = rows_in(take(load(small).train_iterator(4, 0), 20))
    assert rows_in(take(load(small).train_iterator(4, 0), 20)) == first
    assert rows_in(take(load(small).train_iterator(4, 1), 20)) != first


@pytest.mark.parametrize("mixture", [(), ("a=1", "b=3")])
@pytest.mark.parametrize("taken", [0, 3, 60])
def test_a_restored_position_continues_bit_for_bit(small, taken, mixture):
    data = load(small, mixture=mixture)
    iterator = data.train_iterator(8, 0)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    fresh = load(small, mixture=mixture).train_iterator(8, 0)
    take(fresh, 5)
    fresh.set_state(state)
    assert all(map(same, take(fresh, 12), expected))


@pytest.mark.parametrize("mixture", [(), ("a=1", "b=3")])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_have_the_batch_of_one(small, processes, mixture):
    data = load(small, mixture=mixture)
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


@pytest.mark.parametrize("before, after", [(1, 2), (1, 4), (2, 1), (4, 2)])
def test_other_processes_go_on_with_an_epoch_and_miss_no_row(small, before, after):
    data, whole = load(small), sorted(rows_of(small))

    def spread(processes):
        local = 8 // processes
        mine = [range(i * local, (i + 1) * local) for i in range(processes)]
        return [data.train_iterator(8, 0, rows) for rows in mine]

    def take_together(parts, count):
        return [row for _ in range(count) for p in parts for row in rows_in([next(p)])]

    first, then = spread(before), spread(after)
    begun = take_together(first, 10)
    (state, *others) = [part.get_state() for part in first]
    assert all(other == state for other in others) and len(whole) > 80
    for part in then:
        part.set_state(json.loads(json.dumps(state)))
    rows = begun + take_together(then, 2 * len(whole) // 8 - 9)
    for epoch in (rows[: len(whole)], rows[len(whole) : 2 * len(whole)]):
        assert sorted(epoch) == whole


@pytest.mark.parametrize("weights, share", [((1, 3), 0.75), ((0.1, 0.1), 0.5)])
def test_a_mixture_has_its_shares_and_each_source_its_epochs(small, weights, share):
    mixture = [f"{n}={w}" for n, w in zip("ab", weights, strict=True)]
    data = load(small, mixture=mixture)
    own = rows_of(small, "b")
    batches = take(data.train_iterator(8, 0), int(2 * len(own) / share) // 8 + 1)
    groups = np.concatenate([batch.groups[:, 0] for batch in batches])
    assert abs(groups.mean() - share) < 0.01
    running = np.cumsum(groups) - share * np.arange(1, len(groups) + 1)
    assert np.abs(running).max() < 2, "evenly all along"
    rows = [r for r, g in zip(rows_in(batches), groups, strict=True) if g]
    epochs = rows[: len(own)], rows[len(own) : 2 * len(own)]
    assert sorted(epochs[0]) == sorted(own) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_a_source_of_weight_0_is_only_evaluated(small):
    data = load(small, mixture=["a=0", "b=2"])
    assert data.rows == len(rows_of(small, "b"))
    batches = take(data.train_iterator(8, 0), 20)
    assert all((batch.groups == 1).all() for batch in batches)
    assert set(data.held_out_bytes) == {"a", "b"}


@pytest.mark.parametrize(
    "mixture, said",
    [
        (["a=1", "c=1"], r"no source is named 'c'.*has a, b"),
        (["a=1"], "no weight for b"),
        (["a=1", "a=2", "b=1"], "names 'a' twice"),
        (["a=-1", "b=1"], "at least 0"),
        (["a=nan", "b=1"], "at least 0"),
        (["a=inf", "b=1"], "at least 0"),
        (["a=much", "b=1"], "must be a number"),
        (["a=0", "b=0"], "all zeros"),
        (["a", "b=0"], "write name=weight"),
    ],
)
def test_mixtures_that_cannot_be_are_said(small, mixture, said):
    with pytest.raises(UserError, match=said):
        load(small, mixture=mixture)


def test_a_mistyped_source_has_a_suggestion(tmp_path):
    folder = write_texts(tmp_path / "c", make_texts(30))
    config = text_config(tmp_path, f"stories={folder}", mixture=["storys=1"])
    with pytest.raises(UserError, match="did you mean 'stories'"):
        load_text(*text_and_data(config), PLAIN)


def documents_of(ids, marks):
    starts = np.flatnonzero(ids == marks.start)
    return [part.tobytes() for part in np.split(ids, starts)[1:]]


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["eos", "bos"])
def test_held_out_documents_are_in_no_training_row(small, tokenizer):
    marks = DocumentMarks.of(tokenizer)
    sides = [
        {
            document
            for ids in streams(small, "ab", side, tokenizer)
            for document in documents_of(ids, marks)
        }
        for side in ("train", "held")
    ]
    assert len(sides[0]) + len(sides[1]) == 210 and not sides[0] & sides[1]
    assert len(sides[1]) > 8


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["eos", "bos"])
@pytest.mark.parametrize("limit", [1, 900, 10**9])
def test_each_byte_of_the_held_out_documents_is_predicted_once(
    small, tokenizer, limit, isolate
):
    data = load(small, "ab", tokenizer, held_out_bytes=limit, isolate=isolate)
    marks = DocumentMarks.of(tokenizer)
    batches = list(data.held_out_batches(8))
    numbered = list(data.numbered_batches(8))
    assert {batch.tokens.shape for batch in batches} == {(8, 32)}
    for group, ids in enumerate(streams(small, "ab", "held", tokenizer)):
        predicted = np.concatenate(
            [b.targets[(b.weights > 0) & (b.groups == group)] for b in batches]
        )
        own = [m for m in (marks.start, marks.end) if m]
        text = bytes_of(predicted[~np.isin(predicted, own)])
        whole = [
            bytes_of(np.frombuffer(d, "<u2")[1:]) for d in documents_of(ids, marks)
        ]
        whole = [d for d in whole if d]
        count = data.evaluated[group].totals.documents
        assert text == b"".join(whole[:count])
        assert len(text) == data.held_out_bytes[data.groups[group]]
        assert count == len(whole) or len(text) >= limit
        assert len(b"".join(whole[: count - 1])) < limit, "no more than needed"
        assert data.held_out[data.groups[group]].documents == len(whole)
        first = sum(x.totals.documents for x in data.evaluated[:group])
        assert [len(d) for d in whole[:count]] == data.evaluated[group].sizes
        for number, expected in enumerate(whole[:count], first):
            ids = [b.targets[numbers == number] for b, numbers in numbered]
            assert bytes_of(np.concatenate(ids)) == expected
    assert all((n < 0).sum() == (b.segments == 0).sum() for b, n in numbered)


def bytes_of(ids):
    return PLAIN.decode([int(i) for i in ids if i < 256]).encode()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_held_out_rows(small, processes):
    data = load(small)
    local = 8 // processes
    parts = [
        data.held_out_batches(8, range(i * local, (i + 1) * local))
        for i in range(processes)
    ]
    for pieces, whole in zip(
        zip(*parts, strict=True), data.held_out_batches(8), strict=True
    ):
        for field in FIELDS:
            together = np.concatenate([getattr(piece, field) for piece in pieces])
            np.testing.assert_array_equal(together, getattr(whole, field))


def test_too_little_text_is_said_with_what_is_there_and_needed(small):
    tokens = load(small, "b").train["b"].tokens
    needed = 4000 * DataConfig().batch_size + 1
    said = rf"{tokens} training tokens.*needs {needed}"
    data = load(small, "b", data={"seq_len": 4000})
    with pytest.raises(UserError, match=said) as raised:
        data.require_rows(DataConfig().batch_size)
    knob, _, value = str(raised.value).rpartition("=")
    assert knob.endswith(
        "set --config.data." + ("batch_size" if data.rows else "seq_len")
    )
    fitting = {"batch_size": 8, "seq_len": 4000, knob.rpartition(".")[2]: int(value)}
    load(small, "b", data=fitting).require_rows(fitting["batch_size"])
    long = load(small, "b", data={"seq_len": tokens + 1})
    with pytest.raises(UserError, match=r"set --config\.data\.seq_len=\d+$") as raised:
        long.require_rows(2)
    length = int(str(raised.value).rpartition("=")[2])
    assert length == (tokens - 1) // 2, "two rows, and an id that is only predicted"
    load(small, "b", data={"seq_len": length}).require_rows(2)
    with pytest.raises(UserError, match=r"give more text: .* even for rows of 16$"):
        long.require_rows(tokens // 16 + 1)
    (tmp := small / "tiny").mkdir(exist_ok=True)
    write_texts(tmp, make_texts(12, longest=4))
    sizes = {"seq_len": 900, "batch_size": 2}
    data = load(small, ["a", "tiny"], data=sizes, mixture=["a=1", "tiny=1"])
    with pytest.raises(UserError, match=r"wants tiny, which has \d+ training tokens"):
        data.train_iterator(2, 0)


@pytest.mark.parametrize("cache", [True, False])
def test_nothing_held_out_is_said_with_a_share_that_works(small, cache):
    with pytest.raises(UserError, match=r"held_out_share=1e-09: set --config") as said:
        load(small, held_out_share=1e-9, cache=cache)
    flag = str(said.value).partition("set --config.text.held_out_share=")[2]
    share = float(flag.partition(",")[0])
    data = load(small, held_out_share=share, cache=cache)
    assert 0 < sum(total.documents for total in data.held_out.values()) < 30
    (one := small / "one.d").mkdir(exist_ok=True)
    write_texts(one, ["alone"])
    with pytest.raises(UserError, match=r"held_out_share=0\.0 to evaluate nothing"):
        load(small, ["one.d"], held_out_share=1e-9, cache=cache)


@pytest.mark.parametrize("cache", [True, False])
def test_the_size_of_the_text_chooses_how_much_is_held_out(small, tmp_path, cache):
    """It is one document of few, at least, and none where there is only one."""
    by_size = {"held_out_share": BY_SIZE, "cache": cache}
    share = load(small, **by_size).held_out_share
    assert share == 0.1, "little text holds out a tenth"
    size = sum(p.stat().st_size for s in "ab" for p in (small / s).iterdir())
    data = load(small, held_out_bytes=size // 60, **by_size)
    assert 0.045 < data.held_out_share < 0.055, "1.5 times the bytes of each source"
    for few in (5, 9):
        write_texts(tmp_path / f"few{few}", make_texts(few, seed=few))
        data = load(tmp_path, [f"few{few}"], **by_size)
        assert 0 < data.held_out_share <= 0.5
        (held,) = data.held_out.values()
        assert held.documents == 1
        batch = data.sample_batch(1)
        assert batch.tokens.shape == (1, 32)
    write_texts(tmp_path / "one", make_texts(1, seed=3))
    data = load(tmp_path, ["one"], **by_size)
    assert data.held_out_share == 0 and not list(data.held_out_batches(1))
    config = config_of(small, held_out_share=-0.5)
    with pytest.raises(UserError, match=r"held_out_share is -0\.5; .* or -1 to be"):
        check_text(config.text)


def test_the_data_says_what_it_is(small):
    data = load(small, "ab")
    assert data.groups == ["a", "b"] and str(small / "a") in data.origin
    for name, count in (("a", 150), ("b", 60)):
        both = data.train[name] + data.held_out[name]
        assert both.documents == count and both.tokens == both.bytes + count
    assert load(small, "ab").sha256 == data.sha256
    assert load(small, "a").sha256 != data.sha256
    assert load(small, "ab", MARKED).sha256 != data.sha256
    first = data.sample_batch(3)
    np.testing.assert_array_equal(first.tokens.ravel(), streams(small, "a")[0][:96])
    assert dataclasses.is_dataclass(data) and "<function" not in repr(data)


def epochs_of(data, steps):
    rows = DataConfig(kind="text", seq_len=32, batch_size=4)
    config = Config(steps=steps, data=rows, text=TextConfig(sources=("a=b",)))
    return count_epochs(config, data.source_rows, data.shares)


def test_the_doctor_counts_epochs_by_source_and_with_the_mixture(small):
    data = load(small, mixture=["a=1", "b=3"])
    found = epochs_of(data, steps=100)
    numbers = found.numbers
    for name, share in (("a", 0.25), ("b", 0.75)):
        drawn = 400 * share
        assert numbers[f"epochs {name}"] == pytest.approx(
            drawn / len(rows_of(small, name))
        )
    groups = np.concatenate(
        [b.groups[:, 0] for b in take(data.train_iterator(4, 0), 100)]
    )
    drawn = int((groups == 1).sum())
    assert numbers["epochs b"] == pytest.approx(drawn / data.source_rows["b"], rel=0.02)
    assert "b: " in found.text
    equal = epochs_of(load(small), steps=100).numbers
    assert equal["epochs a"] == pytest.approx(equal["epochs"])


def test_a_source_shorter_than_a_row_is_named_as_not_trained(small):
    write_texts(small / "short", ["a"] * 3 + ["b", "c"])
    found = epochs_of(load(small, ["a", "short"], held_out_share=0.3), steps=10)
    assert "short is not trained: it is shorter than a row of 32 tokens" in found.text
    assert "a is not" not in found.text and "epochs short" not in found.numbers


def test_a_share_of_0_trains_all_documents_and_evaluates_none(small, caplog):
    data = load(small, held_out_share=0.0)
    assert data.train["a"].documents == 150 and data.train["b"].documents == 60
    assert list(data.held_out_batches(4)) == [] and not caplog.records
    assert set(data.held_out_bytes.values()) == {0}
    streamed = load(small, held_out_share=0.0, cache=False)
    assert list(streamed.held_out_batches(4)) == []
    assert next(iter(streamed.train_iterator(4, 0))).tokens.shape == (4, 32)


def test_all_rows_are_read_by_their_numbers(small):
    data = load(small)
    whole = data.first_rows(data.rows)
    assert len(whole.tokens) == data.rows > 300
    for first, count in ((0, 7), (5, 9), (data.rows - 3, 200), (data.rows + 5, 9)):
        part = data.counted.rows_from(first, count)
        for name in ("tokens", "targets", "groups"):
            expected = getattr(whole, name)[first : first + count]
            np.testing.assert_array_equal(getattr(part, name), expected)
    assert data.counted.row_lengths().tolist() == [32] * data.rows
    # A source that the mixture draws nothing from has no training rows.
    one, used = load(small, "b"), load(small, mixture=["a=0", "b=1"])
    same_rows = [x.counted.rows_from(3, 50).tokens for x in (one, used)]
    np.testing.assert_array_equal(*same_rows)
    assert len(used.counted.row_lengths()) == one.rows == used.rows
    assert load(small, cache=False).counted is None


@pytest.mark.parametrize("scanned", [50, 1 << 18])
def test_copies_of_documents_are_found_with_their_places(
    small, tmp_path, monkeypatch, scanned
):
    monkeypatch.setattr(tokenized_corpus, "SCAN_TOKENS", scanned)
    texts = make_texts(9, seed=5)
    write_texts(tmp_path / "a", [*texts, texts[2]])
    write_texts(tmp_path / "b", [texts[4]])
    found = load(tmp_path, held_out_share=0.0).counted.copies()
    assert found == [
        ("a, document 10", "a, document 3"),
        ("b, document 1", "a, document 5"),
    ]
