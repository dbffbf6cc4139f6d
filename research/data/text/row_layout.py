"""Joins documents into one stream of ids, and cuts the stream into rows.

Every document starts with an id that text never encodes to. So the stream itself shows
where documents begin, and no index is needed.
"""

import dataclasses
import hashlib
import re

import numpy as np

from research.config.data_knobs import DataConfig, TextConfig
from research.core.errors import UserError, look_up
from research.data.text.document_readers import DocumentPiece
from research.data.token_batch import Batch
from research.tokenize.tokenizer import Tokenizer

HELD_OUT_SALT = b"research/held-out"


@dataclasses.dataclass(frozen=True)
class DocumentMarks:
    """The ids in front of and behind every document.

    Attributes:
      start: id in front of each document.
      end: id behind each document, or None where the next `start` ends it.
      dtype: of ids on disk, little-endian `<u2` or `<u4`.
    """

    start: int
    end: int | None
    dtype: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "DocumentMarks":
        """`bos ... eos` where the tokenizer adds a bos to documents, else `eos ...`.

        Raises:
          UserError: the tokenizer has no id that ends a document.
        """
        if tokenizer.eos is None:
            raise UserError(
                "the tokenizer names no eos_token, and it marks where documents start; "
                "name one in its tokenizer_config.json"
            )
        dtype = "<u2" if tokenizer.largest_id < 1 << 16 else "<u4"
        # If both were one id, the start and the end of a document would look alike.
        if tokenizer.add_bos and tokenizer.bos not in (None, tokenizer.eos):
            return cls(tokenizer.bos, tokenizer.eos, dtype)
        return cls(tokenizer.eos, None, dtype)

    def frame(self, piece: DocumentPiece, ids: np.ndarray) -> np.ndarray:
        """A piece's ids with the marks in front of and behind its document.

        Raises:
          UserError: text encodes to the id that should mark where documents start.
        """
        if (ids == self.start).any():
            raise UserError(
                f"{piece.where}: the tokenizer makes id {self.start} of plain text, "
                "and it marks where documents start; choose another tokenizer"
            )
        front = [self.start] if piece.starts else []
        back = [self.end] if piece.ends and self.end is not None else []
        if not front and not back:
            return ids
        return np.concatenate([front, ids, back]).astype(ids.dtype)


def is_held_out(first: DocumentPiece, share: float) -> bool:
    """Whether a document is held out, by its first piece: equal texts share a side.

    Nothing else matters, so runs with other seeds evaluate the same text.
    """
    return held_out_rank(first) < share * (1 << 64)


def held_out_rank(first: DocumentPiece) -> int:
    """The place of a document among 2 ** 64, by which the first ones are held out."""
    digest = hashlib.blake2b(first.text.encode(), digest_size=8, key=HELD_OUT_SALT)
    return int.from_bytes(digest.digest(), "big")


def lay_rows(
    ids: np.ndarray, lengths: np.ndarray, groups: np.ndarray, marks: DocumentMarks,
    isolate: bool,
) -> Batch:  # fmt: skip
    """A batch of rows that were cut from the stream.

    Args:
      ids: integer `[B, T + 1]`; each row predicts its last T ids from its first T.
      lengths: `[B]`, how many predictions of each row are real; the rest is padding.
      groups: `[B]`, what each row's losses are reported under.
      marks: the ids around each document.
      isolate: whether attention stays within a document.

    Returns:
      Arrays `[B, T]`. A row may start within a document; that one's positions count
      from the start of the row.
    """
    tokens, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    at = np.arange(tokens.shape[1], dtype=np.int32)
    real = at < lengths[:, None]
    positions = np.broadcast_to(at, tokens.shape)
    segments, weights = np.ones_like(tokens), real.astype(np.float32)
    if isolate:
        starts = tokens == marks.start
        starts[:, 0] = True
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
        if marks.end is not None:
            # The next document does not follow from this one.
            weights *= targets != marks.start
    blank = ~real
    for array in (tokens, targets, segments):
        array[blank] = 0
    return Batch(
        tokens=tokens,
        targets=targets,
        weights=weights,
        segments=segments,
        positions=np.where(blank, 0, positions).astype(np.int32),
        groups=np.where(blank, 0, groups[:, None]).astype(np.int32),
    )


# The text of an id ends with no line end, with one behind other letters, with an empty
# line, or is one line end alone.
NO_END, LINE, BLANK, BARE = range(4)


def line_ends(tokenizer: Tokenizer) -> np.ndarray:
    """`[ids]` uint8: one of `NO_END`, `LINE`, `BLANK` and `BARE` for each id."""
    found = np.zeros(tokenizer.largest_id + 1, np.uint8)
    for number in range(len(found)):
        text = re.sub(r"[^\S\n]", "", tokenizer.decode([number]))
        if text.endswith("\n"):
            found[number] = LINE if text[-2:-1].strip() else BARE
            found[number] = BLANK if text.endswith("\n\n") else found[number]
    return found


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The properties that all rows of a run have in common.

    Attributes:
      seq_len: predictions of a row.
      isolate: whether attention stays within a document.
      marks: the ids around each document.
      overlap: predictions of a row that the next one makes again.
      line_ends: what the text of each id ends with, as `line_ends` gives it; None where
        rows are cut anywhere.
    """

    seq_len: int
    isolate: bool
    marks: DocumentMarks
    overlap: int = 0
    line_ends: np.ndarray | None = None

    @classmethod
    def of(
        cls, text: TextConfig, data: DataConfig, marks: DocumentMarks, by: Tokenizer
    ) -> "RowLayout":
        """The layout that the knobs ask for; `by` is the tokenizer of the run."""
        ways = {"anywhere": None, "paragraph": line_ends}
        find = look_up(ways, text.cut, "config.text.cut")
        ends = find(by) if find else None
        return cls(data.seq_len, text.isolate, marks, text.overlap, ends)

    def predictions(self, ids: np.ndarray) -> int:
        """How many predictions the row makes that begins with `ids`.

        Args:
          ids: `[T + 1]` from its first id on, or fewer where the stream ends.
        """
        most = len(ids) - 1
        if self.line_ends is None or most < self.seq_len:
            return most
        least = max(most // 2 + 1, 2)
        ends = self.line_ends[ids[least - 2 : most]]
        before, last = ends[:-1], ends[1:]
        blank = (last == BLANK) | ((last == BARE) & (before > NO_END))
        blank |= ids[least:] == self.marks.start  # The next row begins a document.
        for found in (blank, last > NO_END):
            if found.any():
                return least + int(np.flatnonzero(found)[-1])
        return most

    def stride(self, predictions: int) -> int:
        """From the first id of a row with so many predictions to that of the next."""
        return max(predictions - self.overlap, 1)

    def batch(self, ids: np.ndarray, lengths: np.ndarray, groups: np.ndarray) -> Batch:
        """Calls `lay_rows`."""
        return lay_rows(ids, lengths, groups, self.marks, self.isolate)
