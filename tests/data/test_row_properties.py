"""Properties of all rows: absent columns, the split of equal rows, and packing."""

import numpy as np
import pytest

from research.config.data_knobs import ColumnsConfig, DataConfig
from research.data.instructions.packing import TokenizedDocument, build_batch, pack
from research.data.instructions.row_columns import to_record
from research.data.instructions.row_selection import RowMark, draw
from research.data.row_readers import BadRowError
from research.tokenize.conversation import Record, Turn

pytest.importorskip("hypothesis")  # tests/requirements.txt has it.

from hypothesis import given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=25, deadline=None, database=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@FEW
@given(TEXTS, TEXTS, st.sampled_from([None, float("nan")]))
def test_absent_columns_never_change_a_record(question, answer, absent):
    columns = ColumnsConfig()
    pair = {"instruction": question, "response": answer}
    try:
        expected = to_record(pair, columns, "rows:1")
    except BadRowError as error:
        assert error.reason.startswith("empty")
        return
    full = dict.fromkeys(("messages", "output", "prompt", "system", "category"), absent)
    assert to_record(full | pair, columns, "rows:1") == expected
    assert expected.turns[-1].text == answer.rstrip()


def record(text, category="", where="rows:1"):
    return Record((Turn("user", text), Turn("assistant", "a")), "", category, where)


def draw_one(records, seed):
    """The sides of the rows' keys, one of them held out."""
    marks = [RowMark.of(number, record) for number, record in enumerate(records)]
    sides = draw(marks, 1, DataConfig(), seed)
    return [[mark.key for mark in side] for side in sides]


@FEW
@given(st.lists(st.integers(0, 8), min_size=12, max_size=40), st.integers(0, 99))
def test_equal_rows_stand_on_one_side_and_neither_seed_nor_order_moves_them(
    numbers, seed
):
    records = [record(str(n), "ab"[i % 2], f"rows:{i}") for i, n in enumerate(numbers)]
    if len(set(numbers)) < 2:
        return
    held, rest = draw_one(records, seed)
    assert not {*held} & {*rest} and len(held) + len(rest) == len(records)
    plain = [record(r.turns[0].text) for r in records]
    sides = [
        {*draw_one(rows, number)[0]}
        for number, rows in enumerate((plain, plain[::-1], [*plain, *plain]))
    ]
    assert sides[0] == sides[1] == sides[2]


@FEW
@given(st.data(), st.integers(1, 40), st.integers(0, 99))
def test_packing_keeps_every_document_whole_once_and_apart_from_others(
    data, seq_len, seed
):
    sizes = data.draw(st.lists(st.integers(1, seq_len), max_size=30))
    documents = [
        TokenizedDocument(
            ids=1000 * number + np.arange(size + 1),
            trained=np.arange(size + 1) % 3 > 0,
            group=number % 5,
        )
        for number, size in enumerate(sizes)
    ]
    rows = pack(np.array(sizes, int), seq_len, seed)
    assert sorted(index for row in rows for index in row) == [*range(len(sizes))]
    # Two rows that are both half empty would have fitted into one.
    free = sorted(seq_len - sum(sizes[i] for i in row) for row in rows)
    assert not free or (free[0] >= 0 and sum(2 * x >= seq_len for x in free) <= 1)
    batch = build_batch(rows, documents, seq_len)
    for number, row in enumerate(rows):
        for segment, index in enumerate(row, start=1):
            at = batch.segments[number] == segment
            document = documents[index]
            assert batch.tokens[number][at].tolist() == document.ids[:-1].tolist()
            assert batch.targets[number][at].tolist() == document.ids[1:].tolist()
            assert batch.weights[number][at].tolist() == [*document.trained[1:]]
            assert batch.positions[number][at].tolist() == [*range(document.slots)]
            assert set(batch.groups[number][at]) == {document.group}
    padding = batch.segments == 0
    assert padding.sum() == sum(free) and not batch.weights[padding].any()
