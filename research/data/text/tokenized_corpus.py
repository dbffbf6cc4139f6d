"""Cached sources as rows for training, which can be read in any order."""

import array
import bisect
import collections
import contextlib
import hashlib
import io
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.config.data_knobs import DataConfig, TextConfig
from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.data.batch_order import OrderedBatches, endless
from research.data.dropped_documents import join_sources
from research.data.text.row_layout import RowLayout
from research.data.text.source_fingerprint import sweep_old
from research.data.text.streaming import load_streamed
from research.data.text.text_dataset import (
    HeldOutText,
    TextData,
    check_held_out,
    with_share,
)
from research.data.text.text_sources import mixture_weights, open_sources
from research.data.text.token_cache import CachedSource, open_cache
from research.data.text.token_shards import TextTotals
from research.data.token_batch import Batch
from research.tokenize.tokenizer import Tokenizer

OPEN_FILES = 64
SCAN_TOKENS = 1 << 18
MOST_COMPARED = 1 << 26  # ids of a source in which copies are searched


class TokenStream:
    """One side of a cached source as one long stream of ids.

    Files are read and not mapped into memory: touched pages of a map count as memory
    of the process until the system needs them.
    """

    def __init__(self, cached: CachedSource, side: str):
        """`side` is `train` or `held`."""
        manifest = cached.manifest
        self._dtype = np.dtype(manifest.dtype)
        shards = [s for s in manifest.shards if s.totals(side).tokens]
        self._paths = [s.file(cached.folder, side, manifest.dtype) for s in shards]
        counts = [s.totals(side).tokens for s in shards]
        self._starts = [0, *itertools.accumulate(counts)]
        self._handles: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids `[count]` from position `start` on; the range must lie in the stream.

        Raises:
          UserError: a file is missing or shorter than it was.
        """
        if not 0 <= start <= start + count <= len(self):
            raise ValueError(f"{start} to {start + count} of {len(self)}")
        out = np.empty(count, self._dtype)
        filled = 0
        number = bisect.bisect_right(self._starts, start) - 1
        while filled < count:
            at = start + filled - self._starts[number]
            there = self._starts[number + 1] - self._starts[number] - at
            part = out[filled : filled + min(there, count - filled)]
            self._fill(number, at * self._dtype.itemsize, part)
            filled += len(part)
            number += 1
        return out

    def _fill(self, number: int, offset: int, part: np.ndarray) -> None:
        view = memoryview(part).cast("B")
        try:
            with self._lock:
                while view:
                    got = os.preadv(self._handle(number), [view], offset)
                    if not got:
                        raise OSError("it is shorter than it was")
                    view, offset = view[got:], offset + got
        except OSError as error:
            raise UserError(
                f"tokenised text {self._paths[number]} cannot be read ({error}); start "
                "again; damaged files are then made again"
            ) from error

    def _handle(self, number: int) -> int:
        handle = self._handles.get(number)
        if handle is None:
            handle = os.open(self._paths[number], os.O_RDONLY)
            self._handles[number] = handle
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        self._handles.move_to_end(number)
        return handle


class RowSpans(Sequence[tuple[int, int]]):
    """Where the rows of a stream begin, and how many predictions each makes.

    Rows that are cut anywhere are counted. Rows that end at paragraphs follow from each
    other, so the ends of all of them are found once and kept beside the ids: 8 bytes a
    row, of which a process maps what it reads.
    """

    def __init__(self, stream: TokenStream, layout: RowLayout, folder: Path):
        self._length, self._stride = layout.seq_len, layout.stride(layout.seq_len)
        self._ends: np.ndarray | None = None
        self._overlap, targets = layout.overlap, max(len(stream) - 1, 0)
        self._count = max(targets - self._overlap, 0) // self._stride
        if layout.line_ends is None:
            return
        file = folder / f"row-ends-{layout.seq_len}-{layout.overlap}.npy"
        with contextlib.suppress(OSError, ValueError):
            self._ends = np.load(file, mmap_mode="r")
        if self._ends is None or (self._ends[-1:] != targets).any():
            self._ends = _row_ends(stream, layout)
            with contextlib.suppress(OSError):  # A finished cache may be read-only.
                written = io.BytesIO()
                np.save(written, self._ends)
                write_whole(file, written.getvalue())
        self._count = len(self._ends)

    def __len__(self) -> int:
        return self._count

    def lengths(self) -> np.ndarray:
        """The predictions `[rows]` of all rows."""
        if self._ends is None:
            return np.full(self._count, self._length)
        starts = np.concatenate([[0], self._ends[:-1] - self._overlap])
        return self._ends - starts[: self._count]

    def __getitem__(self, row: int) -> tuple[int, int]:
        """The first id of a row, and the number of its predictions."""
        if self._ends is None:
            return row * self._stride, self._length
        start = int(self._ends[row - 1]) - self._overlap if row else 0
        return start, int(self._ends[row]) - start


def _row_ends(stream: TokenStream, layout: RowLayout) -> np.ndarray:
    """`[rows]` int64: the last id of each row, which it only predicts."""
    ends, start, targets = array.array("q"), 0, len(stream) - 1
    while start < targets:
        ids = stream.read(start, min(layout.seq_len, targets - start) + 1)
        predictions = layout.predictions(ids)
        ends.append(start + predictions)
        if ends[-1] == targets:
            break
        start += layout.stride(predictions)
    return np.array(ends, np.int64)


def load_text(
    text: TextConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    knob: str = "config.text.sources",
) -> TextData:
    """Opens the sources of `text`, cached or streamed; makes caches first.

    `knob` is the one that the user gave them by.

    Raises:
      UserError: a source, its text or the mixture cannot be used.
    """
    sources = open_sources(text, data, knob)
    # A typo should be reported now, and not after hours of tokenising.
    mixture_weights(text, [source.name for source in sources])
    text = with_share(text, sources)
    if not text.cache:
        return load_streamed(text, data, sources, tokenizer)
    cached = [
        open_cache(source, tokenizer, text, process_index, process_count)
        for source in sources
    ]
    sweep_old(text)
    layout = RowLayout.of(text, data, cached[0].marks, tokenizer)
    found = _Corpus(text, cached, layout).text_data(
        ", ".join(f"{source.name} ({source.where})" for source in sources)
    )
    check_held_out(text.held_out_share, found.held_out, sources)
    return found


class _Corpus:
    """All cached sources; their training rows are numbered consecutively."""

    def __init__(
        self, text: TextConfig, cached: list[CachedSource], row_layout: RowLayout
    ):
        self._text = text
        self._cached = cached
        self._names = [c.name for c in cached]
        self._row_layout = row_layout
        self._streams = [TokenStream(c, "train") for c in cached]
        self._spans = [
            RowSpans(stream, row_layout, c.folder)
            for stream, c in zip(self._streams, cached, strict=True)
        ]
        self._rows = [len(spans) for spans in self._spans]
        self._offsets = np.cumsum([0, *self._rows])
        self._weights = mixture_weights(text, self._names)

    def text_data(self, origin: str) -> TextData:
        manifests = [c.manifest for c in self._cached]
        evaluated = [self._evaluated(c) for c in self._cached]
        dropped = dict(zip(self._names, [m.dropped() for m in manifests], strict=True))
        digests = "".join(f"{m.key}{m.sha256}" for m in manifests)
        return TextData(
            groups=self._names,
            origin=origin,
            sha256=hashlib.sha256(digests.encode()).hexdigest(),
            train=self._by_name(m.total("train") for m in manifests),
            held_out=self._by_name(m.total("held") for m in manifests),
            source_rows=self._by_name(self._rows),
            shares=self._weights
            or self._by_name(n / max(sum(self._rows), 1) for n in self._rows),
            held_out_bytes=self._by_name(e.totals.bytes for e in evaluated),
            held_out_share=self._text.held_out_share,
            dropped=join_sources(dropped),
            row_layout=self._row_layout,
            evaluated=evaluated,
            training=self._batches,
            first_rows=lambda count: self.rows_from(0, count),
            counted=self,
        )

    def _by_name(self, values: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self._names, values, strict=True))

    def _used(self) -> list[bool]:
        return [not self._weights or self._weights[name] > 0 for name in self._names]

    def _batches(
        self, batch_size: int, seed: int, mine: Sequence[int] | None
    ) -> OrderedBatches:
        return OrderedBatches(self._order(seed), self._batch, batch_size, mine)

    def _order(self, seed: int) -> Any:
        import grain

        if not self._weights:
            return endless(0, sum(self._rows), seed)
        chosen = [i for i, used in enumerate(self._used()) if used]
        for i in chosen:
            if not self._rows[i]:
                raise UserError(
                    f"config.text.mixture wants {self._names[i]}, which has "
                    f"{len(self._streams[i])} training tokens and no row of "
                    f"{self._row_layout.seq_len}; give it more text or the weight 0"
                )
        return grain.MapDataset.mix(
            [
                endless(
                    int(self._offsets[i]), self._rows[i], _seed_of(seed, self._names[i])
                )
                for i in chosen
            ],
            [self._weights[self._names[i]] for i in chosen],
        )

    def _batch(self, numbers: np.ndarray) -> Batch:
        length = self._row_layout.seq_len
        groups = np.searchsorted(self._offsets, numbers, side="right") - 1
        ids = np.zeros((len(numbers), length + 1), self._row_layout.marks.dtype)
        lengths = np.empty(len(numbers), np.int32)
        for i, (number, group) in enumerate(zip(numbers, groups, strict=True)):
            row = int(number - self._offsets[group])
            start, lengths[i] = self._spans[group][row]
            count = lengths[i] + 1
            ids[i, :count] = self._streams[group].read(start, count)
        return self._row_layout.batch(ids, lengths, groups)

    def rows_from(self, first: int, count: int) -> Batch:
        """The rows from number `first` on, in the order of the used sources."""
        used = np.flatnonzero(self._used())
        rows = np.array(self._rows)[used]
        ends = np.cumsum(rows)
        numbers = np.arange(first, max(first, min(first + count, int(ends[-1]))))
        source = np.searchsorted(ends, numbers, side="right")
        begins = self._offsets[used] - (ends - rows)
        return self._batch(numbers + begins[source])

    def row_lengths(self) -> np.ndarray:
        """The predictions `[rows]` that each row makes."""
        used = itertools.compress(self._spans, self._used())
        return np.concatenate([spans.lengths() for spans in used])

    def copies(self) -> list[tuple[str, str]]:
        """`(place, place of the first)` of documents with the ids of one before.

        They are searched among the first `MOST_COMPARED` ids of each source.
        """
        before: dict[bytes, str] = {}
        found = []
        for i in np.flatnonzero(self._used()):
            marks = self._row_layout.marks
            digests = _document_digests(self._streams[i], marks.start)
            for number, digest in enumerate(digests, 1):
                place = f"{self._names[i]}, document {number}"
                if (first := before.setdefault(digest, place)) != place:
                    found.append((place, first))
        return found

    def _evaluated(self, cached: CachedSource) -> HeldOutText:
        """Whole documents in order, up to `held_out_bytes`, and at least one."""
        stream = TokenStream(cached, "held")
        lengths = cached.manifest.held_lengths()
        ends = np.cumsum(lengths)
        enough = np.searchsorted(ends, self._text.held_out_bytes) + 1
        count = min(int(enough), len(lengths))
        tokens = _end_of(stream, count, len(lengths), cached.marks.start)
        sizes = lengths[:count]
        return HeldOutText(TextTotals(count, tokens, sum(sizes)), stream.read, sizes)


def _end_of(stream: TokenStream, count: int, documents: int, start: int) -> int:
    """The number of ids in the first `count` documents of a stream."""
    if count == documents:
        return len(stream)
    seen = 0
    for at in range(0, len(stream), SCAN_TOKENS):
        ids = stream.read(at, min(SCAN_TOKENS, len(stream) - at))
        starts = np.flatnonzero(ids == start)
        if seen + len(starts) > count:
            return at + int(starts[count - seen])
        seen += len(starts)
    raise ValueError(f"{documents} documents were written, and {seen} are there")


def _document_digests(stream: TokenStream, start: int) -> Iterator[bytes]:
    """A digest of each of the first documents of a stream, in order."""
    size = min(len(stream), MOST_COMPARED)
    digest = None
    for at in range(0, size, SCAN_TOKENS):
        ids = stream.read(at, min(SCAN_TOKENS, size - at))
        head, *rest = np.split(ids, np.flatnonzero(ids == start))
        if digest is not None:
            digest.update(head.tobytes())
        for part in rest:
            if digest is not None:
                yield digest.digest()
            digest = hashlib.blake2b(part.tobytes(), digest_size=16)
    if digest is not None and size == len(stream):  # Else it may be cut.
        yield digest.digest()


def _seed_of(seed: int, name: str) -> int:
    """A seed for one source, so that no two sources are shuffled alike."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
