"""Tokenises text while training reads it, in the order of its sources, without a cache.

This suits text that is read about once, or text that is too large to be stored twice.
Every process tokenises all of it and keeps its own rows.
"""

import collections
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from research.config.knob_groups import DataConfig, TextConfig
from research.core.errors import UserError
from research.data.text.document_readers import DocumentPiece, TextSource
from research.data.text.parallel_tokenization import encoded
from research.data.text.row_layout import DocumentMarks, RowLayout, is_held_out
from research.data.text.text_dataset import HeldOutText, TextData, check_held_out
from research.data.text.text_sources import mixture_weights
from research.data.text.token_shards import TextTotals
from research.data.token_batch import Batch
from research.tokenize.tokenizer import Tokenizer

# Smaller than for a cache, because training waits for the first of them.
BATCH_BYTES = 512 << 10
# The search for held-out documents ends after this much text, or after this multiple
# of the text that should hold enough of them.
SEARCH_BYTES = 64 << 20
SEARCH_FACTOR = 20


def load_streamed(
    text: TextConfig,
    data: DataConfig,
    sources: list[TextSource],
    tokenizer: Tokenizer,
) -> TextData:
    """Reads the documents to evaluate. Training reads the rest later.

    Raises:
      UserError: a source, its text or the mixture cannot be used.
    """
    marks = DocumentMarks.of(tokenizer)
    names = [source.name for source in sources]
    row_layout = RowLayout(data.seq_len, text.isolate, marks)
    weights = mixture_weights(text, names) or _by_size(sources)
    left_out: collections.Counter[str] = collections.Counter()
    evaluated = [
        _held_out(source, tokenizer, marks, text, left_out) for source in sources
    ]

    def batches(size: int, seed: int, mine: Sequence[int] | None) -> StreamedBatches:
        readers = [
            _Reader(source, tokenizer, marks, text.held_out_share) for source in sources
        ]
        shares = [weights[name] for name in names]
        return StreamedBatches(readers, shares, row_layout, size, mine)

    held_out = {
        name: stretch.totals for name, stretch in zip(names, evaluated, strict=True)
    }
    check_held_out(text.held_out_share, held_out)
    return TextData(
        groups=names,
        origin=", ".join(f"{s.name} ({s.where}), streamed" for s in sources),
        sha256=_identity(text, data.bad_lines, sources, tokenizer, evaluated),
        train={},
        held_out=held_out,
        rows=0,
        held_out_bytes={name: totals.bytes for name, totals in held_out.items()},
        left_out=dict(left_out),
        row_layout=row_layout,
        evaluated=evaluated,
        training=batches,
        first_rows=lambda rows: next(batches(rows, 0, None)),
    )


class _Reader:
    """An endless stream of the training ids of one source; it can start anywhere.

    A position is `[pass over the source, piece within it, id within the piece]`.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        marks: DocumentMarks,
        share: float,
    ):
        self._source = source
        self._tokenizer = tokenizer
        self._layout = marks
        self._share = share
        self.seek([0, 0, 0])

    def seek(self, position: Sequence[int]) -> None:
        """Continues from a position; earlier text is read again, but not tokenised."""
        around, index, offset = position
        self._ahead = encoded(
            self._pieces(around, index),
            lambda item: item[2].text,
            self._tokenizer,
            self._layout.dtype,
            BATCH_BYTES,
        )
        self._here: collections.deque[tuple[int, int, np.ndarray]]
        self._here = collections.deque()
        self._position = list(position)
        self._there = -offset

    @property
    def position(self) -> list[int]:
        """The position of the next row's first id."""
        return list(self._position)

    def take(self, count: int) -> np.ndarray:
        """The next ids `[count + 1]`; the last is also the first of the next row."""
        while self._there <= count:
            (around, index, piece), ids = next(self._ahead)
            ids = self._layout.frame(piece, ids)
            self._here.append((around, index, ids))
            self._there += len(ids)
        offset, missing = self._position[2], count + 1
        parts = []
        for _, _, ids in self._here:
            parts.append(ids[offset : offset + missing])
            missing -= len(parts[-1])
            offset = 0
            if not missing:
                break
        self._advance(count)
        return np.concatenate(parts)

    def _advance(self, count: int) -> None:
        offset = self._position[2] + count
        while offset >= len(self._here[0][2]):
            offset -= len(self._here.popleft()[2])
        self._position = [*self._here[0][:2], offset]
        self._there -= count

    def _pieces(
        self, around: int, index: int
    ) -> Iterator[tuple[int, int, DocumentPiece]]:
        for turn in itertools.count(around):
            held, found = False, False
            pieces = self._source.read(self._source.files, collections.Counter())
            for number, piece in enumerate(pieces):
                held = is_held_out(piece, self._share) if piece.starts else held
                found |= not held
                if not held and (turn > around or number >= index):
                    yield turn, number, piece
            if not found:
                raise UserError(
                    f"text source {self._source.name}={self._source.where} has no text "
                    "to train on; give more, or lower config.text.held_out_share"
                )


class StreamedBatches:
    """Endless batches; each row comes from the source that its weights put next."""

    def __init__(
        self,
        readers: list[_Reader],
        weights: list[float],
        row_layout: RowLayout,
        batch_size: int,
        mine: Sequence[int] | None,
    ):
        self._readers = readers
        self._weights = np.array(weights)
        self._row_layout = row_layout
        self._size = batch_size
        self._mine = range(batch_size) if mine is None else mine
        self._taken = np.zeros(len(readers), np.int64)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        length = self._row_layout.seq_len
        ids = np.empty((self._size, length + 1), self._row_layout.marks.dtype)
        groups = np.empty(self._size, np.int32)
        for i in range(self._size):
            # The source that is furthest behind its share of the rows so far.
            behind = self._weights * (self._taken.sum() + 1) - self._taken
            groups[i] = np.argmax(behind)
            ids[i] = self._readers[groups[i]].take(length)
            self._taken[groups[i]] += 1
        own = list(self._mine)
        return self._row_layout.batch(ids[own], np.full(len(own), length), groups[own])

    def get_state(self) -> dict[str, Any]:
        """The position as JSON data."""
        return {
            "rows": self._taken.tolist(),
            "positions": [reader.position for reader in self._readers],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = np.array(state["rows"], np.int64)
        for reader, position in zip(self._readers, state["positions"], strict=True):
            reader.seek(position)


def _by_size(sources: list[TextSource]) -> dict[str, float]:
    """Shares by bytes on disk, or equal shares where a size is unknown."""
    sizes = [sum(item.size for item in source.files) for source in sources]
    if not all(sizes):
        sizes = [1] * len(sources)
    return {s.name: n / sum(sizes) for s, n in zip(sources, sizes, strict=True)}


def _held_out(
    source: TextSource,
    tokenizer: Tokenizer,
    marks: DocumentMarks,
    text: TextConfig,
    left_out: collections.Counter[str],
) -> HeldOutText:
    """The first held-out documents, each whole, up to about `held_out_bytes`."""
    expected = text.held_out_bytes / max(text.held_out_share, 1e-9)
    room = max(SEARCH_BYTES, SEARCH_FACTOR * expected) if text.held_out_share else 0
    found: list[np.ndarray] = []
    documents, size, held = 0, 0, False
    for piece in source.read(source.files, left_out):
        between = piece.starts or not held
        if between and (size >= text.held_out_bytes or room <= 0):
            break
        if piece.starts:
            held = is_held_out(piece, text.held_out_share)
            documents += held
        room -= len(piece.text)
        if held:
            (ids,) = tokenizer.encode_arrays([piece.text], marks.dtype)
            found.append(marks.frame(piece, ids))
            size += len(piece.text.encode())
    ids = np.concatenate(found) if found else np.empty(0, marks.dtype)
    return HeldOutText(
        TextTotals(documents, len(ids), size),
        lambda start, count: ids[start : start + count],
    )


def _identity(
    text: TextConfig,
    bad_lines: str,
    sources: list[TextSource],
    tokenizer: Tokenizer,
    held: list[HeldOutText],
) -> str:
    """sha256 over names, sizes and the evaluated text; the rest is still unread."""
    parts = {
        "tokenizer": tokenizer.fingerprint,
        "held_out_share": text.held_out_share,
        "policies": [text.undecodable, bad_lines],
        "sources": [
            [s.name, s.column, s.revision, [[i.name, i.size] for i in s.files]]
            for s in sources
        ],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for stretch in held:
        digest.update(stretch.read(0, stretch.totals.tokens).tobytes())
    return digest.hexdigest()
