"""Every document is laid out once per epoch, whatever the number of processes."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from tiny_model import make_tiny_model

from research.config.run_config import Config, DataConfig, TextConfig
from research.core.errors import UserError
from research.data.instructions.instruction_dataset import (
    PackedDocuments,
    eval_batches,
    load_dataset,
    training_batches,
)
from research.data.instructions.packing import TokenizedDocument, build_batch, pack
from research.data.instructions.row_selection import load_rows
from research.data.instructions.row_store import (
    RowUnit,
    StoredDocuments,
    pack_numbers,
    write_unit,
)
from research.tasks.findings import count_mask
from research.tokenize.chat_template import ChatFormat
from research.tokenize.tokenizer import from_folder

FIELDS = ("tokens", "targets", "weights", "segments", "positions", "groups")


def random_documents(count=60, longest=33, seed=0):
    """Ids are unique over all documents, so a batch tells where each came from."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, count)
    starts = np.cumsum(lengths) - lengths
    return [
        TokenizedDocument(
            np.arange(start, start + n).astype(np.int32),
            np.arange(n) >= rng.integers(1, n),
            int(rng.integers(0, 5)),
        )
        for start, n in zip(starts, lengths, strict=True)
    ]


def slots(documents):
    return np.array([document.slots for document in documents])


def stored(documents, folder):
    """The documents in two units, as a run reads them."""
    sizes = []
    for number, part in enumerate((documents[:7], documents[7:])):
        numbers = pack_numbers(part)
        ids = sum(len(document.ids) for document in part)
        where = [f"rows.jsonl:{i}" for i in range(len(part))]
        digest = hashlib.sha256(numbers).hexdigest()
        unit = RowUnit("train", number, where, {}, ids, digest, [], {}, 0, [], [])
        write_unit(folder, unit, numbers)
        sizes.append(unit.size)
    return StoredDocuments(folder, sizes)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    documents = stored(random_documents(), tmp_path_factory.mktemp("units"))
    return PackedDocuments.of(documents, 32, seed=0)


def test_stored_documents_are_those_that_were_written(tmp_path):
    documents = random_documents()
    read = stored(documents, tmp_path)
    assert len(read) == len(documents)
    for one, other in zip(documents, read, strict=True):
        assert one.ids.dtype == other.ids.dtype and one.group == other.group
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)
    assert read.where(6) == "rows.jsonl:6" and read.where(8) == "rows.jsonl:1"
    packed = PackedDocuments.of(read, 32, seed=0)
    stops = frozenset({int(documents[i].ids[-1]) for i in (3, 9)})
    counted = count_mask([packed.batch(packed.rows)], stops)
    assert counted.ends == read.count_ends(stops) > 0
    assert counted.real == packed.real_tokens and counted.documents == len(read)
    assert counted.trained == packed.trained_tokens


@pytest.mark.parametrize("seed", range(3))
def test_packing_uses_each_document_once_and_fills_no_row_over(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 500)
    rows = pack(lengths, 64, seed)
    assert sorted(index for row in rows for index in row) == list(range(500))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 64
    # No two rows could have shared one: best fit never leaves such a pair.
    emptiest = sorted(filled)[:2]
    assert sum(emptiest) > 64


@pytest.mark.parametrize("seed", range(3))
def test_packing_takes_the_tightest_row(seed):
    """4 belongs to the 6: beside the 5, it would leave no room for both 3 and 2."""
    assert len(pack(np.array([5, 3, 6, 2, 4]), 10, seed)) == 2


def test_packing_depends_on_the_seed_alone():
    lengths = np.random.default_rng(0).integers(1, 33, 200)
    assert pack(lengths, 64, 1) == pack(lengths, 64, 1)
    assert pack(lengths, 64, 1) != pack(lengths, 64, 2)


@pytest.mark.parametrize("lengths", [[3, 0], [3, 65]], ids=str)
def test_packing_refuses_what_cannot_lie_in_a_row(lengths):
    with pytest.raises(ValueError, match="1 to 64"):
        pack(np.array(lengths), 64, 0)


def test_a_row_is_its_documents_side_by_side(split):
    batch = split.batch(split.rows)
    for field in FIELDS:
        array = getattr(batch, field)
        assert array.shape == (len(split.rows), 32)
        assert array.dtype == (np.float32 if field == "weights" else np.int32)
    for i, row in enumerate(split.rows):
        for number, index in enumerate(row, start=1):
            document = split.documents[index]
            at = batch.segments[i] == number
            np.testing.assert_array_equal(batch.tokens[i, at], document.ids[:-1])
            np.testing.assert_array_equal(batch.targets[i, at], document.ids[1:])
            np.testing.assert_array_equal(batch.weights[i, at], document.trained[1:])
            np.testing.assert_array_equal(batch.positions[i, at], range(at.sum()))
            assert (batch.groups[i, at] == document.group).all()
            assert (np.diff(np.flatnonzero(at)) == 1).all(), "in one piece"
        padding = batch.segments[i] == 0
        for field in FIELDS:
            assert not getattr(batch, field)[i, padding].any(), field


def test_the_split_counts_what_is_in_its_batches(split):
    batch = split.batch(split.rows)
    assert split.real_tokens == (batch.segments != 0).sum()
    assert split.trained_tokens == batch.weights.sum() > 0
    assert split.fill == (batch.segments != 0).mean()


def rows_in(batches):
    """Each row of a list of batches, as its tokens' bytes."""
    return [row.tobytes() for batch in batches for row in batch.tokens]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    return all((getattr(left, f) == getattr(right, f)).all() for f in FIELDS)


def test_an_epoch_has_each_row_once_and_the_next_another_order(split):
    whole = sorted(rows_in([split.batch(split.rows)]))
    count = len(split.rows)
    # A batch may hold the end of an epoch and the start of the next.
    rows = rows_in(take(training_batches(split, 4, seed=0), count))
    epochs = [rows[i * count : (i + 1) * count] for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == whole
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_alone(split):
    first = rows_in(take(training_batches(split, 4, seed=0), 8))
    assert rows_in(take(training_batches(split, 4, seed=0), 8)) == first
    assert rows_in(take(training_batches(split, 4, seed=1), 8)) != first


@pytest.mark.parametrize("taken", [0, 3, 11])
def test_a_restored_position_continues_bit_for_bit(split, taken):
    iterator = training_batches(split, 4, seed=0)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    fresh = training_batches(split, 4, seed=0)
    take(fresh, 5)
    fresh.set_state(state)
    assert all(map(same, take(fresh, 12), expected))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batch_of_one(split, processes):
    local = 8 // processes
    parts = [
        training_batches(split, 8, 0, range(i * local, (i + 1) * local))
        for i in range(processes)
    ]
    whole = training_batches(split, 8, seed=0)
    for _ in range(6):
        pieces = [next(part) for part in parts]
        together = np.concatenate([piece.tokens for piece in pieces])
        np.testing.assert_array_equal(together, next(whole).tokens)
        assert {len(piece.tokens) for piece in pieces} == {8 // processes}


@pytest.mark.parametrize("before, after", [(1, 2), (1, 4), (2, 1), (4, 2)])
def test_other_processes_go_on_with_an_epoch_and_miss_no_row(split, before, after):
    """Each example exactly once, whoever has begun the epoch and whoever ends it."""
    count = len(split.rows)
    first, then = spread(split, before), spread(split, after)
    begun = [take_together(first) for _ in range(2)]
    (state, *others) = [part.get_state() for part in first]
    assert all(other == state for other in others)
    for part in then:
        part.set_state(json.loads(json.dumps(state)))
    ended = [take_together(then) for _ in range(2 * count // 8)]
    rows = [row for batch in begun + ended for row in batch]
    whole = sorted(rows_in([split.batch(split.rows)]))
    assert count > 16 and len(rows) >= 2 * count
    for epoch in (rows[:count], rows[count : 2 * count]):
        assert sorted(epoch) == whole


def spread(split, processes, batch_size=8):
    """The iterators of so many processes, each with its rows of a batch."""
    local = batch_size // processes
    return [
        training_batches(split, batch_size, 0, range(i * local, (i + 1) * local))
        for i in range(processes)
    ]


def take_together(parts):
    """The rows of the next batch, first to last."""
    return [row for part in parts for row in rows_in([next(part)])]


def test_batches_of_one_row_come_too(split):
    rows = rows_in(take(training_batches(split, 1, seed=0), len(split.rows)))
    assert sorted(rows) == sorted(rows_in([split.batch(split.rows)]))


def test_a_batch_larger_than_an_epoch_still_comes(split):
    batch = next(training_batches(split, 4 * len(split.rows), seed=0))
    assert sorted(set(rows_in([batch]))) == sorted(rows_in([split.batch(split.rows)]))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_each_row_once_and_empty_rows_besides(split, processes):
    local = 8 // processes
    parts = [
        [*eval_batches(split, 8, range(i * local, (i + 1) * local))]
        for i in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-len(split.rows) // 8)}
    batches = [batch for part in parts for batch in part]
    assert {len(batch.tokens) for batch in batches} == {8 // processes}
    filled = [
        tokens.tobytes()
        for batch in batches
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True)
        if segments.any()
    ]
    assert sorted(filled) == sorted(rows_in([split.batch(split.rows)]))
    assert sum(batch.weights.sum() for batch in batches) == split.trained_tokens


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return TextConfig(cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("base") / "model")
    return ChatFormat(from_folder(folder), "chat")


def config_of(**changes):
    return Config(data=DataConfig(**{"seq_len": 1024, "max_rows": 96} | changes))


def test_a_dataset_holds_every_row_on_one_side(chat, text):
    config = config_of(held_out=16, seq_len=2048)
    dataset = load_dataset(config.data, config.seed, chat, text)
    assert len(dataset.held_out.documents) == len(dataset.held_out_records) == 16
    assert len(dataset.train.documents) == 80 and not dataset.counts.dropped
    sides = [
        {document.ids.tobytes() for document in side.documents}
        for side in (dataset.train, dataset.held_out)
    ]
    assert not sides[0] & sides[1]
    expected = {
        np.array(encoded.ids, np.int32).tobytes()
        for encoded in chat.encode_many(
            [*load_rows(config.data, config.seed).records()]
        )
    }
    assert sides[0] | sides[1] == expected
    names = [dataset.categories[d.group] for d in dataset.held_out.documents]
    assert names == [record.category for record in dataset.held_out_records]
    assert sorted(set(names)) == dataset.categories


def test_rows_that_are_too_long_are_cut_or_counted(chat, text):
    config = config_of(seq_len=400, held_out=8)
    cut = load_dataset(config.data, config.seed, chat, text)
    data = dataclasses.replace(config.data, overlength="drop")
    dropped = load_dataset(data, config.seed, chat, text)
    assert cut.counts.truncated > 0 and dropped.counts.truncated == 0
    assert (
        dropped.counts.dropped["too long"]
        == cut.counts.dropped["too long"] + cut.counts.truncated
    )
    for dataset in (cut, dropped):
        sides = (dataset.train, dataset.held_out)
        kept = sum(len(side.documents) for side in sides)
        assert kept + dataset.counts.dropped["too long"] == 96
        lengths = [slots(side.documents).max() for side in sides]
        assert max(lengths) <= 400
        for side in sides:
            # The answer is whole: its end is the last id, and it is trained.
            ends = {d.ids[-1].item() for d in side.documents if d.trained[-1]}
            assert ends <= chat.stop_ids and all(d.trained[-1] for d in side.documents)


def test_a_row_length_that_nothing_fits_is_the_users_error(chat, text):
    with pytest.raises(UserError, match=r"config\.data\.seq_len=8"):
        load_dataset(config_of(seq_len=8).data, 0, chat, text)


@pytest.mark.soak
def test_real_dolly_packs_tightly_and_trains_answers_only(dolly_path, smollm2, text):
    chat = ChatFormat(smollm2.tokenizer, "chat")
    config = Config(data=DataConfig(path=str(dolly_path), max_rows=5_000))
    dataset = load_dataset(config.data, config.seed, chat, text)
    assert dataset.counts.total > 4_700 and len(dataset.categories) == 8
    assert dataset.train.fill > 0.99
    share = dataset.train.trained_tokens / dataset.train.real_tokens
    assert 0.2 < share < 0.8
    for document in dataset.train.documents:
        assert document.slots <= 512
        assert document.trained[-1] and document.ids[-1] == smollm2.tokenizer.eos
        assert not document.trained[0]


def test_build_batch_of_nothing_is_padding():
    batch = build_batch([[], []], [], 8)
    assert batch.tokens.shape == (2, 8) and not batch.segments.any()


@pytest.mark.parametrize("overlength", ["truncate", "drop"])
def test_an_enormous_row_is_seen_by_its_length(tmp_path, monkeypatch, overlength, text):
    """Its tokens are never made, and rows beside it are kept."""
    texts = ["a b " * 500_000, "fine"]
    rows = [
        {"instruction": "q", "context": context, "response": response}
        for context in texts
        for response in texts
    ] + [{"instruction": f"q{i}", "response": "fine"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = from_folder(make_tiny_model(tmp_path / "model"))
    encoded = []
    encode = tokenizer.encode_texts
    monkeypatch.setattr(
        tokenizer,
        "encode_texts",
        lambda texts, *rest: encoded.extend(texts) or encode(texts, *rest),
    )
    config = DataConfig(path=str(path), seq_len=64, held_out=5, overlength=overlength)
    data = load_dataset(config, 0, ChatFormat(tokenizer, "dolly"), text)
    assert max(map(len, encoded)) < 100_000
    long = 2 if overlength == "truncate" else 3
    assert data.counts.dropped == {"too long": long}
    assert data.counts.truncated == (overlength == "truncate")
    assert len(data.train.documents) + len(data.held_out.documents) == len(rows) - long
