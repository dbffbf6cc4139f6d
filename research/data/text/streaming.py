"""Tokenises text while training reads it, without a cache.

This suits text that is read about once, or text that is too large to be stored twice.
A large source is dealt into shares of equal size, which are read side by side, each in
the order of the source. The rows of a batch are dealt to the shares by their number, so
a process reads and tokenises only the shares of its own rows, and the batches are the
same for any number of processes. A small source is one share.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from research.config.data_knobs import DataConfig, TextConfig
from research.core.errors import UserError
from research.data.batch_order import Alive, Union, still
from research.data.dropped_documents import DroppedDocuments, join_sources
from research.data.source_shares.share_division import (
    PART_BYTES,
    UNDIVIDED,
    Deal,
    choose_deal,
    deal_shares,
)
from research.data.source_shares.share_reader import (
    ShareReader,
    TokenizedStream,
    Tokenizing,
)
from research.data.text.document_readers import TextSource
from research.data.text.parallel_tokenization import WORKERS
from research.data.text.row_layout import DocumentMarks, RowLayout, is_held_out
from research.data.text.text_dataset import HeldOutText, TextData, check_held_out
from research.data.text.text_sources import mixture_weights
from research.data.text.token_shards import TextTotals
from research.data.token_batch import Batch
from research.tokenize.tokenizer import Tokenizer

# Smaller than for a cache, because training waits for the first of them.
BATCH_BYTES = 512 << 10
LEAST_BATCH_BYTES = 32 << 10  # of one share
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
    row_layout = RowLayout.of(text, data, marks, tokenizer)
    weights = mixture_weights(text, names) or _by_size(sources)
    dropped = {name: DroppedDocuments() for name in names}
    evaluated, seen = zip(
        *(
            _held_out(source, tokenizer, marks, text, dropped[source.name])
            for source in sources
        ),
        strict=True,
    )
    # The first part of a file then has all text that is evaluated, cut as here.
    part_bytes = max(PART_BYTES, *seen)
    streams = [
        TokenizedStream(source, tokenizer, marks, text.held_out_share)
        for source in sources
    ]
    shares = [weights[name] for name in names]

    def batches(size: int, seed: int, mine: Sequence[int] | None) -> StreamedBatches:
        deals = [choose_deal(source, size, part_bytes) for source in sources]
        return StreamedBatches(streams, shares, row_layout, deals, size, mine)

    def first_rows(rows: int) -> Batch:
        undivided = [UNDIVIDED] * len(streams)
        return next(StreamedBatches(streams, shares, row_layout, undivided, rows))

    held_out = {
        name: stretch.totals for name, stretch in zip(names, evaluated, strict=True)
    }
    check_held_out(text.held_out_share, held_out, sources)
    return TextData(
        groups=names,
        origin=", ".join(f"{s.name} ({s.where}), streamed" for s in sources),
        sha256=_identity(text, data.bad_lines, sources, tokenizer, evaluated),
        train={},
        held_out=held_out,
        source_rows={},
        shares=weights,
        held_out_bytes={name: totals.bytes for name, totals in held_out.items()},
        held_out_share=text.held_out_share,
        dropped=join_sources(dropped),
        row_layout=row_layout,
        evaluated=list(evaluated),
        training=batches,
        first_rows=first_rows,
    )


class StreamedBatches:
    """Endless batches; each row comes from the source that its weights put next."""

    def __init__(
        self,
        streams: Sequence[TokenizedStream],
        weights: Sequence[float],
        row_layout: RowLayout,
        deals: Sequence[Deal],
        batch_size: int,
        mine: Sequence[int] | None = None,
    ):
        """Args:
        streams: the sources, in the order of `Batch.groups`.
        weights: the share of the rows that comes from each.
        row_layout: of every row.
        deals: how each source is dealt into shares.
        batch_size: rows of a global batch.
        mine: the rows of a global batch that this process builds; by default all.
        """
        self.alive: Alive = still
        self._streams = streams
        self._weights = np.array(weights)
        self._row_layout = row_layout
        self._size = batch_size
        self._mine = range(batch_size) if mine is None else mine
        self._pool = ThreadPoolExecutor(WORKERS, "encode")
        self._taken = np.zeros(len(streams), np.int64)
        self._open(deals)

    def _open(self, deals: Sequence[Deal]) -> None:
        """Makes the readers of the shares that this process needs, by source."""
        self._deals = list(deals)
        needed = [{self._share_of(row, deal) for row in self._mine} for deal in deals]
        least = min(LEAST_BATCH_BYTES, BATCH_BYTES)
        tokenizing = Tokenizing(
            max(BATCH_BYTES // max(map(len, needed)), least),
            self._pool,
            lambda: self.alive(),
        )
        self._readers: list[dict[int, ShareReader]] = []
        for stream, deal, numbers in zip(self._streams, deals, needed, strict=True):
            shares = deal_shares(stream.source, deal)
            self._readers.append(
                {n: ShareReader(stream, shares, n, tokenizing) for n in sorted(numbers)}
            )

    def _share_of(self, row: int, deal: Deal) -> int:
        return row * deal.count // self._size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        length = self._row_layout.seq_len
        ids = np.empty((self._size, length + 1), self._row_layout.marks.dtype)
        groups, lengths = np.empty((2, self._size), np.int32)
        turn = self._turn()
        for i in range(self._size):
            # The source that is furthest behind its share of the rows so far.
            behind = self._weights * (self._taken.sum() + 1) - self._taken
            group = int(np.argmax(behind))
            row = (i + turn) % self._size
            groups[row] = group
            self._taken[group] += 1
            reader = self._readers[group].get(self._share_of(row, self._deals[group]))
            if reader:
                ids[row], lengths[row] = reader.take_row(self._row_layout)
        own = list(self._mine)
        return self._row_layout.batch(ids[own], lengths[own], groups[own])

    def _turn(self) -> int:
        """The row of the batch that chooses its source first.

        It moves from batch to batch: where sources alternate, each share of each source
        must be drawn from.
        """
        if all(deal.count == 1 for deal in self._deals):
            return 0
        return int(self._taken.sum()) // self._size

    def get_state(self) -> dict[str, Any]:
        """The position as JSON data; null for shares that other processes read."""
        return {
            "rows": self._taken.tolist(),
            "deals": [list(deal) for deal in self._deals],
            "positions": [
                [
                    readers[n].position if n in readers else None
                    for n in range(deal.count)
                ]
                for readers, deal in zip(self._readers, self._deals, strict=True)
            ],
        }

    def joined(self, state: dict[str, Any], union: Union) -> dict[str, Any]:
        """A state of `get_state` with the positions that only other processes know."""
        own = [json.dumps(p) if p else "" for each in state["positions"] for p in each]
        found = iter(union(own))
        positions = [
            [json.loads(next(found)) for _ in each] for each in state["positions"]
        ]
        return {**state, "positions": positions}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position, whatever the number of processes that saved it.

        Older runs had no deals. They counted pieces from the beginning of the source,
        so reading has to start there, once.

        Raises:
          UserError: the shares do not go with the rows of a batch.
        """
        positions = state["positions"]
        if "deals" not in state:
            positions = [[[turn, 0, None, 0, n, at]] for turn, n, at in positions]
        stored = state.get("deals", [UNDIVIDED] * len(positions))
        deals = [Deal(*deal) for deal in stored]
        for stream, deal in zip(self._streams, deals, strict=True):
            if self._size % deal.count:
                raise UserError(
                    f"the run reads text source {stream.source.name} in {deal.count} "
                    "shares; config.data.batch_size must be a multiple of that"
                )
        self._taken = np.array(state["rows"], np.int64)
        self._open(deals)
        for readers, places in zip(self._readers, positions, strict=True):
            for number, reader in readers.items():
                reader.seek(places[number])


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
    dropped: DroppedDocuments,
) -> tuple[HeldOutText, int]:
    """The first held-out documents, each whole, up to about `held_out_bytes`.

    Returns:
      The documents, and how many bytes of text were read to find them.
    """
    expected = text.held_out_bytes / max(text.held_out_share, 1e-9)
    room = max(SEARCH_BYTES, SEARCH_FACTOR * expected) if text.held_out_share else 0
    found: list[np.ndarray] = []
    sizes: list[int] = []
    size, seen, held = 0, 0, False
    for piece in source.read(source.files, dropped):
        between = piece.starts or not held
        if between and (size >= text.held_out_bytes or room <= 0):
            break
        if piece.starts:
            held = is_held_out(piece, text.held_out_share)
            sizes += [0] * held
        room -= len(piece.text)
        piece_bytes = len(piece.text.encode())
        seen += piece_bytes
        if held:
            (ids,) = tokenizer.encode_arrays([piece.text], marks.dtype)
            found.append(marks.frame(piece, ids))
            size += piece_bytes
            sizes[-1] += piece_bytes
    ids = np.concatenate(found) if found else np.empty(0, marks.dtype)
    held_out = HeldOutText(
        TextTotals(len(sizes), len(ids), size),
        lambda start, count: ids[start : start + count],
        sizes,
    )
    return held_out, seen


def _identity(
    text: TextConfig,
    bad_lines: str,
    sources: list[TextSource],
    tokenizer: Tokenizer,
    held: Sequence[HeldOutText],
) -> str:
    """sha256 over names, sizes and the evaluated text; the rest is still unread.

    So an edit that keeps the size of a file is noticed only in the evaluated text.
    """
    parts = {
        "tokenizer": tokenizer.fingerprint,
        "held_out_share": text.held_out_share,
        "policies": [text.undecodable, bad_lines, *filter(None, [text.hard_cut])],
        "sources": [
            [s.name, s.column, s.revision, [[i.name, i.size] for i in s.files]]
            for s in sources
        ],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for stretch in held:
        digest.update(stretch.read(0, stretch.totals.tokens).tobytes())
    return digest.hexdigest()
