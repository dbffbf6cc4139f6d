"""The first training rows as data: token ids, their text, and which are trained."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from research.data.token_batch import Batch


@dataclasses.dataclass(frozen=True)
class PreviewSpan:
    """Neighbouring tokens of one document that are all trained, or all not.

    Attributes:
      ids: token ids.
      text: the decoded ids, control tokens included.
      trained: whether the prediction of these tokens counts in the loss.
    """

    ids: tuple[int, ...]
    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class PreviewDocument:
    """One document of a packed row.

    Attributes:
      group: its category or source; losses are reported under this name.
      where: the place in the data that it comes from, such as `rows.jsonl:7`.
      spans: its tokens in order. The first token is never trained: nothing
        predicts it.
    """

    group: str
    where: str
    spans: tuple[PreviewSpan, ...]


@dataclasses.dataclass(frozen=True)
class PreviewRow:
    """One row of a training batch, or a document alone that shows a schema.

    `dataclasses.asdict` gives an entry of `rows` in `preview.json`.

    Attributes:
      documents: in the order of the row.
      schema: the columns that the document was read from; empty for a row of a batch.
    """

    documents: tuple[PreviewDocument, ...]
    schema: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PreviewRow":
        """Undoes `dataclasses.asdict`."""
        return cls(
            tuple(
                PreviewDocument(
                    document["group"],
                    document["where"],
                    tuple(
                        PreviewSpan(tuple(span["ids"]), span["text"], span["trained"])
                        for span in document["spans"]
                    ),
                )
                for document in values["documents"]
            ),
            values.get("schema", ""),
        )


@dataclasses.dataclass(frozen=True)
class RowPage:
    """Some training rows of a data set, and facts about all of them.

    Attributes:
      first: the number of the first of `rows`, from 0.
      rows: as the model reads them.
      lengths: int `[rows]`, tokens of every training row.
      copies: `(place, place of the first)` of rows, or of documents of raw text, with
        the same tokens as one before; held-out rows are among them.
      too_long: rows that were cut or dropped, because they were too long.
    """

    first: int
    rows: Sequence[PreviewRow]
    lengths: np.ndarray
    copies: Sequence[tuple[str, str]]
    too_long: int


def preview_rows(
    batch: "Batch",
    groups: Sequence[str],
    decode: Callable[[list[int]], str],
    where: Callable[[int, int], str],
) -> list[PreviewRow]:
    """Reads tokens and trained marks off a batch, as the loss will read them.

    A document of n predictions has n + 1 tokens: its inputs, and its last target.

    Args:
      batch: host arrays `[rows, seq]`.
      groups: the names that `batch.groups` counts along.
      decode: text of token ids.
      where: `where(row, document)`, both counted from 0, says where a document
        comes from.
    """
    rows = []
    for row in range(batch.tokens.shape[0]):
        segments = np.asarray(batch.segments[row])
        documents = []
        for number, segment in enumerate(np.unique(segments[segments > 0])):
            at = np.flatnonzero(segments == segment)
            ids = np.append(batch.tokens[row, at], batch.targets[row, at[-1]])
            trained = np.append(False, batch.weights[row, at] > 0)
            group = groups[int(batch.groups[row, at[0]])]
            spans = _cut_spans(ids, trained, decode)
            documents.append(PreviewDocument(group, where(row, number), spans))
        rows.append(PreviewRow(tuple(documents)))
    return rows


def _cut_spans(
    ids: np.ndarray, trained: np.ndarray, decode: Callable[[list[int]], str]
) -> tuple[PreviewSpan, ...]:
    edges = np.flatnonzero(np.diff(trained)) + 1
    parts = zip(np.split(ids, edges), np.split(trained, edges), strict=True)
    return tuple(
        PreviewSpan(tuple(part.tolist()), decode(part.tolist()), bool(mask[0]))
        for part, mask in parts
    )
