"""Text for pre-training, cached or streamed: training batches and held-out batches."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from research.config.data_knobs import BY_SIZE, TextConfig
from research.config.field_names import shell_flag
from research.core.errors import UserError
from research.data.batch_order import Batches
from research.data.document_pieces import DocumentPiece
from research.data.dropped_documents import DroppedDocuments
from research.data.text.document_readers import TextSource
from research.data.text.row_layout import RowLayout, held_out_rank, is_held_out
from research.data.text.token_shards import TextTotals
from research.data.token_batch import Batch

SEARCHED = 2000  # pieces of each source, for a share that holds out some of them
MOST_SHARE = 0.5  # that `config.text.held_out_share` may be
# By size, the kept documents have so many times the bytes that are evaluated, within
# these shares. Nobody knows the size of text on the hub, and it gets the lowest one.
ROOM, LOWEST_SHARE, HIGHEST_SHARE = 1.5, 0.01, 0.1
LEAST_ROW = 16  # tokens of a row that is still worth a proposal


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Held-out documents of one source, whole and in order.

    Attributes:
      totals: of these documents.
      read: `read(start, count)` gives ids `[count]`.
      sizes: UTF-8 bytes of each.
    """

    totals: TextTotals
    read: Callable[[int, int], np.ndarray]
    sizes: Sequence[int]


class CountedText(Protocol):
    """Text whose training rows are known before they are read."""

    def rows_from(self, first: int, count: int) -> Batch:
        """The rows from number `first` on, in the order of the sources."""

    def row_lengths(self) -> np.ndarray:
        """The predictions `[rows]` that each row makes."""

    def copies(self) -> list[tuple[str, str]]:
        """`(place, place of the first)` of documents with the ids of one before."""


@dataclasses.dataclass(frozen=True)
class TextData:
    """The training side and the held-out side of all sources.

    Attributes:
      groups: source names; `Batch.groups` numbers them.
      origin: the sources and their places, for people.
      sha256: of the tokenised text, to tell one data set from another.
      train: totals by source; empty for streamed text, which nobody has counted.
      held_out: totals by source of the documents that are kept from training; where
        the text is streamed, only of those that are evaluated.
      source_rows: different training rows by source; empty where text is streamed.
      shares: the share of the training rows that is drawn from each source.
      held_out_bytes: UTF-8 bytes by source of exactly the documents evaluated.
      held_out_share: of the documents that are kept for evaluation.
      dropped: the documents that are not used; of streamed text, those that were met
        in the search for held-out ones.
      row_layout: the shape of every row.
      evaluated: the held-out documents of each source, in the order of `groups`.
      training: `training(batch_size, seed, mine)` gives the training batches.
      first_rows: `first_rows(n)` gives training rows in the order of the sources.
      counted: all training rows by their numbers; None where the text is streamed.
    """

    groups: list[str]
    origin: str
    sha256: str
    train: dict[str, TextTotals]
    held_out: dict[str, TextTotals]
    source_rows: dict[str, int]
    shares: dict[str, float]
    held_out_bytes: dict[str, int]
    held_out_share: float
    dropped: DroppedDocuments
    row_layout: RowLayout = dataclasses.field(repr=False)
    evaluated: list[HeldOutText] = dataclasses.field(repr=False)
    training: Callable[[int, int, Sequence[int] | None], Batches] = dataclasses.field(
        repr=False
    )
    first_rows: Callable[[int], Batch] = dataclasses.field(repr=False)
    counted: CountedText | None = dataclasses.field(repr=False, default=None)

    @property
    def rows(self) -> int:
        """Different rows that training draws; 0 where the text is streamed."""
        return sum(n for name, n in self.source_rows.items() if self.shares[name])

    def train_iterator(
        self, batch_size: int, seed: int, mine: Sequence[int] | None = None
    ) -> Batches:
        """Endless batches; `mine` are the rows of each that this process builds."""
        return self.training(batch_size, seed, mine)

    def require_rows(self, batch_size: int) -> None:
        """Raises UserError where there are fewer rows than a batch has."""
        if self.train and self.rows < batch_size:
            tokens = sum(totals.tokens for totals in self.train.values())
            needed = batch_size * self.row_layout.seq_len + 1
            raise UserError(
                f"the text has {tokens} training tokens, and a batch of {batch_size} "
                f"rows of {self.row_layout.seq_len} needs {needed}; give more text"
                f"{self._or_fitting(batch_size)}"
            )

    def _or_fitting(self, batch_size: int) -> str:
        """The flag of a batch that the rows fill, or of rows that fill the batch."""
        if self.rows:  # A power of 2 divides over devices.
            size = 1 << (self.rows.bit_length() - 1)
            return f", or set {shell_flag('data.batch_size', size)}"
        # Without a mixture, no row is no share.
        used = [n for n in self.train if self.shares[n]] or self.train
        tokens = [self.train[name].tokens - 1 for name in used]
        for length in range(self.row_layout.seq_len, LEAST_ROW - 1, -1):
            if sum(x // length for x in tokens) >= batch_size:
                return f", or set {shell_flag('data.seq_len', length)}"
        return f": this is far too little, even for rows of {LEAST_ROW}"

    def sample_batch(self, rows: int) -> Batch:
        """The first training rows, for people to look at."""
        return self.first_rows(rows)

    def held_out_batches(
        self, batch_size: int, mine: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """The evaluated documents, each byte predicted once; the last batch is padded.

        `mine` are the rows of each global batch that this process builds.
        """
        for chosen in self._evaluated_rows(batch_size):
            own = chosen if mine is None else [chosen[i] for i in mine]
            yield self._evaluation_batch(own)

    def numbered_batches(self, batch_size: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """`held_out_batches`, with the number of the document at each position.

        Numbers `[B, T]` count the documents of all sources from 0; padding has -1.
        """
        counts = [stretch.totals.documents for stretch in self.evaluated]
        last = np.cumsum([0, *counts])[:-1] - 1  # The document before, by source.
        for rows in self._evaluated_rows(batch_size):
            batch = self._evaluation_batch(rows)
            numbers = np.full(batch.tokens.shape, -1)
            for row, (group, _, count) in enumerate(rows):
                if count:
                    starts = batch.tokens[row, :count] == self.row_layout.marks.start
                    numbers[row, :count] = last[group] + np.cumsum(starts)
                    last[group] = numbers[row, count - 1]
            yield batch, numbers

    def _evaluated_rows(self, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
        """Group, start and count of each row, by batch; empty rows fill the last."""
        rows = [
            (
                group,
                start,
                min(self.row_layout.seq_len, stretch.totals.tokens - 1 - start),
            )
            for group, stretch in enumerate(self.evaluated)
            for start in range(0, stretch.totals.tokens - 1, self.row_layout.seq_len)
        ]
        starts = range(0, len(rows), batch_size)
        logging.info("text: %d held-out batches of %d rows", len(starts), batch_size)
        for first in starts:
            chosen = rows[first : first + batch_size]
            yield chosen + [(0, 0, 0)] * (batch_size - len(chosen))

    def _evaluation_batch(self, rows: list[tuple[int, int, int]]) -> Batch:
        ids = np.zeros((len(rows), self.row_layout.seq_len + 1), np.int32)
        for i, (group, start, count) in enumerate(rows):
            if count:
                ids[i, : count + 1] = self.evaluated[group].read(start, count + 1)
        groups, _, lengths = np.array(rows, np.int32).reshape(-1, 3).T
        return self.row_layout.batch(ids, lengths, groups)


def with_share(text: TextConfig, sources: Sequence[TextSource]) -> TextConfig:
    """`text` with a share of held-out documents, chosen by size where it has none.

    Some document is then held out, and another one trained. If no share up to a half
    does so, as of one document alone, the share is 0. The hub is not asked, because a
    resume does not need it.
    """
    if text.held_out_share != BY_SIZE:
        return text
    if any(source.revision for source in sources):
        return dataclasses.replace(text, held_out_share=LOWEST_SHARE)
    size = sum(item.size for source in sources for item in source.files)
    share = ROOM * text.held_out_bytes * len(sources) / max(size, 1)
    share = min(max(round(share, 4), LOWEST_SHARE), HIGHEST_SHARE)
    sides: set[bool] = set()
    for piece in _first_pieces(sources):
        sides.add(is_held_out(piece, share))
        if len(sides) == 2:
            break
    else:
        share = _fitting_share(sources)
    return dataclasses.replace(text, held_out_share=share)


def check_held_out(
    config_share: float,
    evaluated: dict[str, TextTotals],
    sources: Sequence[TextSource],
) -> None:
    """Warns of each source that has no held-out document.

    Raises:
      UserError: no source has one, though a share of the documents was asked for.
    """
    if not config_share:
        return
    without = [name for name, totals in evaluated.items() if not totals.documents]
    if len(without) == len(evaluated):
        fitting = _fitting_share(sources)
        raise UserError(
            f"no document of {', '.join(without)} was kept for evaluation at "
            f"config.text.held_out_share={config_share:g}: set "
            f"{shell_flag('text.held_out_share', fitting)}"
            f"{'' if fitting else ' to evaluate nothing'}, or give more documents"
        )
    for name in without:
        logging.warning(
            "text: no document of %s was kept for evaluation; raise "
            "config.text.held_out_share",
            name,
        )


def _fitting_share(sources: Sequence[TextSource]) -> float:
    """Holds out about a tenth of the documents and at least one; 0 if none can be."""
    ranks = {held_out_rank(piece) for piece in _first_pieces(sources)}
    places = [rank / (1 << 64) for rank in sorted(ranks)]
    if len(places) > 1:
        tenth = places[max(len(places) // 10, 1) - 1]
        share = math.ceil(tenth * 1e4 + 1) / 1e4
        if share <= min(places[-1], MOST_SHARE):
            return share
    return 0.0


def _first_pieces(sources: Sequence[TextSource]) -> Iterator[DocumentPiece]:
    """The first pieces of the first documents of each source."""
    for source in sources:
        pieces = itertools.islice(source.read(source.files), SEARCHED)
        yield from (piece for piece in pieces if piece.starts)
