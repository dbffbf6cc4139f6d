"""A preview shows each token once, marked as the loss will count it."""

import numpy as np
import pytest

from research.data.text.row_layout import DocumentMarks, lay_rows
from research.tasks.row_preview import preview_rows

GROUPS = ["a", "b", "c"]


def tokens_of(document):
    ids = [token for span in document.spans for token in span.ids]
    return ids, [span.trained for span in document.spans for _ in span.ids]


def check(batch, rows):
    """Compares inputs, targets, weights and groups with the batch, by position."""
    assert len(rows) == batch.tokens.shape[0]
    for i, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row.documents):
            ids, trained = tokens_of(document)
            here = (i, slice(at, at + len(ids) - 1))
            assert batch.tokens[here].tolist() == ids[:-1]
            assert batch.targets[here].tolist() == ids[1:]
            assert (batch.weights[here] > 0).tolist() == trained[1:] and not trained[0]
            assert set(batch.segments[here]) == {batch.segments[i, at]}
            assert {GROUPS[g] for g in batch.groups[here]} == {document.group}
            assert document.where == f"row {i} document {number}"
            for span in document.spans:
                assert span.text == " ".join(map(str, span.ids))
            at += len(ids) - 1
        assert not batch.segments[i, at:].any()


def preview(batch):
    return preview_rows(
        batch,
        GROUPS,
        lambda ids: " ".join(map(str, ids)),
        lambda row, document: f"row {row} document {document}",
    )


def test_packed_rows_with_masks(batch):
    rows = preview(batch)
    check(batch, rows)
    assert max(len(row.documents) for row in rows) > 1


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("end", [None, 2])
def test_rows_of_text(isolate, end):
    """An isolated document that has an end does not predict the start of the next."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 9, (6, 33)).astype("<u2")
    lengths, groups = np.array([32, 32, 32, 7, 1, 0]), np.arange(6) % 3
    batch = lay_rows(ids, lengths, groups, DocumentMarks(1, end, "<u2"), isolate)
    rows = preview(batch)
    check(batch, rows)
    assert (len(rows[0].documents) > 1) == isolate and not rows[-1].documents
    untrained = [s for d in rows[0].documents for s in d.spans[1:] if not s.trained]
    assert bool(untrained) == (isolate and end is not None)


def test_a_row_that_trains_nothing_is_one_span_a_document(batch):
    blank = type(batch)(**{**vars(batch), "weights": np.zeros_like(batch.weights)})
    spans = [d.spans for row in preview(blank) for d in row.documents]
    assert {len(x) for x in spans} == {1} and not any(x[0].trained for x in spans)
