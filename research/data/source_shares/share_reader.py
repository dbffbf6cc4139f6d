"""The token ids of one share of a source, without end and from any position."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.data.batch_order import Alive
from research.data.document_pieces import DocumentPiece
from research.data.row_readers import START, Place
from research.data.text.document_readers import SourceFile, TextSource
from research.data.text.parallel_tokenization import encoded
from research.data.text.row_layout import DocumentMarks, RowLayout, is_held_out
from research.tokenize.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizedStream:
    """A source, and how its text becomes ids.

    Attributes:
      source: the text.
      tokenizer: of the run.
      marks: the ids around each document.
      held_out_share: of the documents, which are not trained.
    """

    source: TextSource
    tokenizer: Tokenizer
    marks: DocumentMarks
    held_out_share: float


@dataclasses.dataclass(frozen=True)
class Tokenizing:
    """Shared by all readers of a process.

    Attributes:
      batch_bytes: about so much text is tokenised at a time.
      pool: the threads that tokenise.
      alive: called for every piece that is read, and while text is skipped.
    """

    batch_bytes: int
    pool: ThreadPoolExecutor
    alive: Alive


class ShareReader:
    """An endless stream of the training ids of one share; it can start anywhere.

    A position is `[pass over the share, file or part within it, at, number, skip, id
    within the piece]`, where `at`, `number` and `skip` are a `Place` in the file. After
    each pass the reader takes the next share: so no reader has only a share without
    text to train on.
    """

    def __init__(
        self,
        stream: TokenizedStream,
        shares: list[list[SourceFile]],
        number: int,
        tokenizing: Tokenizing,
    ):
        """Args:
        stream: the source.
        shares: all shares of it.
        number: of the share to begin with.
        tokenizing: shared with other readers.
        """
        self._stream = stream
        self._shares = shares
        self._number = number
        self._tokenizing = tokenizing
        self.seek([0, 0, *START, 0])

    def seek(self, position: Sequence[Any]) -> None:
        """Continues from a position. Reading starts at its place in the file."""
        *_, offset = position
        tokenizing, stream = self._tokenizing, self._stream
        self._ahead = encoded(
            self._pieces(*position[:-1]),
            lambda item: item[2].text,
            stream.tokenizer,
            stream.marks.dtype,
            tokenizing.batch_bytes,
            tokenizing.pool,
        )
        self._here: collections.deque[tuple[list[Any], np.ndarray]]
        self._here = collections.deque()
        self._position = list(position)
        self._there = -offset

    @property
    def position(self) -> list[Any]:
        """The position of the next row's first id."""
        return list(self._position)

    def take(self, count: int) -> np.ndarray:
        """The next ids `[count + 1]`; the last is also the first of the next row."""
        ids = self._peek(count)
        self._advance(count)
        return ids

    def take_row(self, layout: RowLayout) -> tuple[np.ndarray, int]:
        """Ids `[seq_len + 1]`, and how many predictions the row makes with them."""
        ids = self._peek(layout.seq_len)
        predictions = layout.predictions(ids)
        self._advance(layout.stride(predictions))
        return ids, predictions

    def _peek(self, count: int) -> np.ndarray:
        """The next ids `[count + 1]`."""
        while self._there <= count:
            (turn, item, piece), ids = next(self._ahead)
            ids = self._stream.marks.frame(piece, ids)
            self._here.append(([turn, item, *piece.place], ids))
            self._there += len(ids)
        offset, missing = self._position[-1], count + 1
        parts = []
        for _, ids in self._here:
            parts.append(ids[offset : offset + missing])
            missing -= len(parts[-1])
            offset = 0
            if not missing:
                break
        return np.concatenate(parts)

    def _advance(self, count: int) -> None:
        offset = self._position[-1] + count
        while offset >= len(self._here[0][1]):
            offset -= len(self._here.popleft()[1])
        self._position = [*self._here[0][0], offset]
        self._there -= count

    def _pieces(
        self, first_turn: int, first_item: int, *first_place: Any
    ) -> Iterator[tuple[int, int, DocumentPiece]]:
        start, source = Place(*first_place), self._stream.source
        skip, empty = start.skip, 0
        for turn in itertools.count(first_turn):
            share = self._shares[(self._number + turn) % len(self._shares)]
            held, found = False, bool(first_item or start.at)
            for item in range(first_item, len(share)):
                pieces = source.read(
                    [share[item]], start=start, alive=self._tokenizing.alive
                )
                start = START
                for piece in pieces:
                    self._tokenizing.alive()
                    held = (
                        is_held_out(piece, self._stream.held_out_share)
                        if piece.starts
                        else held
                    )
                    found |= not held
                    if skip:
                        skip -= 1
                    elif not held:
                        yield turn, item, piece
            first_item, empty = 0, 0 if found else empty + 1
            if empty == len(self._shares):
                raise UserError(
                    f"text source {source.name}={source.where} has no text to train "
                    "on; give more, or lower config.text.held_out_share"
                )
