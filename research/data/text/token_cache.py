"""Tokenises a source once, into a folder that any number of runs share.

The inputs are cut into units, and the processes of a run share the units. A unit
becomes shards of about `SHARD_BYTES` of text; a shard that is finished is never made
again and never deleted, so a build that is killed or fails loses at most the shards in
work.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from research.config.data_knobs import TextConfig
from research.core.atomic_files import remove_leftovers
from research.core.cache_folders import use_entry
from research.core.errors import UserError
from research.data.dropped_documents import DroppedDocuments
from research.data.shared_builds import UnitClaims
from research.data.text import document_readers
from research.data.text.document_readers import DocumentPiece, SourceFile, TextSource
from research.data.text.parallel_tokenization import encoded
from research.data.text.row_layout import DocumentMarks, is_held_out
from research.data.text.source_fingerprint import cache_folder, cannot_write, source_key
from research.data.text.token_shards import (
    TextTotals,
    TokenManifest,
    TokenShard,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from research.tokenize.tokenizer import Tokenizer

FORMAT = 1
UNIT_BYTES = 16 << 20
SHARD_BYTES = 16 << 20
SECONDS_BETWEEN_LINES = 5.0
# If all processes together finish no shard for so many seconds, those on other machines
# are dead. This process then makes their units, too.
PATIENCE = 120.0


@dataclasses.dataclass(frozen=True)
class CachedSource:
    """The finished cache of one source.

    Attributes:
      name: the name of the source.
      folder: holds the shards.
      manifest: lists the shards.
      marks: the ids around each document.
    """

    name: str
    folder: Path
    manifest: TokenManifest
    marks: DocumentMarks


def open_cache(
    source: TextSource,
    tokenizer: Tokenizer,
    config: TextConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> CachedSource:
    """Opens the tokenised source; tokenises it first where no cache of it exists.

    Processes that share the folder share the units, also those of different runs. Each
    begins at another unit, and returns once all units exist.

    Raises:
      UserError: an input cannot be read or used, or the folder cannot be written.
    """
    marks = DocumentMarks.of(tokenizer)
    cache = cache_folder(config)
    key = source_key(source, cache, _settings(source, tokenizer, marks, config))
    folder = cache / "tokens" / f"{source.name}-{key[:16]}"
    try:
        use_entry(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    manifest = read_manifest(folder, key)
    if manifest is None:
        try:
            remove_leftovers(folder)
            build = _CacheBuild(source, tokenizer, marks, config.held_out_share, folder)
            manifest = build.run(key, process_index / process_count)
        except OSError as error:
            raise cannot_write(folder, error) from error
    total = manifest.total("train") + manifest.total("held")
    if not total.documents:
        dropped = manifest.dropped()
        first = f"; the first is {dropped.lines()[0]}" if manifest.named else ""
        raise UserError(
            f"text source {source.name}={source.where} has no readable text "
            f"(dropped: {dropped or 'nothing'}){first}"
        )
    return CachedSource(source.name, folder, manifest, marks)


def _settings(
    source: TextSource, tokenizer: Tokenizer, marks: DocumentMarks, config: TextConfig
) -> dict:
    return {
        "format": FORMAT,
        "sizes": [
            document_readers.PIECE_BYTES,
            document_readers.PART_BYTES,
            UNIT_BYTES,
            SHARD_BYTES,
        ],
        "folder": source.is_folder,
        "tokenizer": tokenizer.fingerprint,
        "layout": dataclasses.astuple(marks),
        "held_out_share": config.held_out_share,
    } | ({"hard_cut": source.hard_cut} if source.hard_cut else {})


def units_of(files: Iterable[SourceFile]) -> list[list[SourceFile]]:
    """Groups neighbouring files up to `UNIT_BYTES`; a larger file stands alone."""
    units: list[list[SourceFile]] = []
    room = 0
    for item in files:
        if not units or item.size > room:
            units.append([])
            room = UNIT_BYTES
        units[-1].append(item)
        room -= item.size
    return units


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A piece to add to a shard; a step without a piece only ends a unit."""

    unit: int
    number: int
    piece: DocumentPiece | None
    size: int
    held: bool
    closes: bool
    last: bool
    dropped: DroppedDocuments


class _OpenShard:
    """A shard that is being made: ids and counts, but no text."""

    def __init__(self) -> None:
        self.data = (bytearray(), bytearray())
        self._documents, self._bytes, self._pieces = [0, 0], [0, 0], 0
        self._tokens = [0, 0]
        self._held_lengths: list[int] = []
        self._held_continues = False

    def add(self, step: _Step, ids: np.ndarray) -> None:
        """Adds a tokenised piece."""
        side = int(step.held)
        self.data[side].extend(ids.tobytes())
        self._pieces += 1
        self._documents[side] += step.piece.starts
        self._tokens[side] += len(ids)
        self._bytes[side] += step.size
        if step.held:
            if step.piece.starts or not self._held_lengths:
                self._held_continues |= not step.piece.starts
                self._held_lengths.append(0)
            self._held_lengths[-1] += step.size

    def shard(self, end: _Step) -> TokenShard:
        """The finished shard, given its last step."""
        train, held = (
            TextTotals(*counts)
            for counts in zip(self._documents, self._tokens, self._bytes, strict=True)
        )
        return TokenShard(
            unit=end.unit,
            number=end.number,
            pieces=self._pieces,
            train=train,
            held=held,
            held_lengths=self._held_lengths,
            held_continues=self._held_continues,
            sha256=[hashlib.sha256(data).hexdigest() for data in self.data],
            last=end.last,
            left_out=end.dropped.counts,
            named=end.dropped.named,
        )


class _CacheBuild:
    """Makes the missing shards of a source."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        marks: DocumentMarks,
        held_out_share: float,
        folder: Path,
    ):
        self._source = source
        self._tokenizer = tokenizer
        self._layout = marks
        self._share = held_out_share
        self._folder = folder
        self._units = units_of(source.files)
        self._claims = UnitClaims(folder, len(self._units), self._is_finished)
        self._seen = 0
        self._begun = self._said = time.monotonic()

    def run(self, key: str, begin: float) -> TokenManifest:
        """Makes units, waits for those of others, writes the manifest.

        Args:
          key: of the manifest.
          begin: the share of the units before the one that this process makes first.
        """
        count = len(self._units)
        logging.info(
            "text: tokenising %s (%s), %d files in %d units, into %s",
            self._source.name, self._source.where, len(self._source.files), count,
            self._folder,
        )  # fmt: skip
        first = int(begin * count)
        with self._claims:
            self._make(self._claims.take([*range(first, count), *range(first)]))
            shards, named = self._wait_for(range(count))
        manifest = TokenManifest(key, self._layout.dtype, shards, named)
        write_manifest(self._folder, manifest)
        self._claims.clear()
        self._sum_up(manifest)
        return manifest

    def _make(self, units: Iterable[int]) -> bool:
        """Makes claimed units and frees them; returns whether there were any."""
        shard_in_work, any_made = _OpenShard(), False
        for step, ids in encoded(
            (step for unit in units for step in self._steps(unit)),
            lambda step: step.piece.text if step.piece else "",
            self._tokenizer,
            self._layout.dtype,
        ):
            any_made = True
            if step.piece:
                shard_in_work.add(step, self._layout.frame(step.piece, ids))
            if step.closes:
                shard = shard_in_work.shard(step)
                write_shard(self._folder, shard, shard_in_work.data, self._layout.dtype)
                shard_in_work = _OpenShard()
            if step.last:
                self._claims.free(step.unit)
        return any_made

    def _steps(self, unit: int) -> Iterator[_Step]:
        """The pieces of an unfinished unit that no finished shard holds."""
        dropped = DroppedDocuments()
        pieces = self._source.read(self._units[unit], dropped)
        number, taken, filled, held = 0, 0, 0, False
        done = read_shard(self._folder, unit, 0, self._layout.dtype)
        piece = next(pieces, None)
        if piece is None:
            yield _Step(unit, 0, None, 0, False, True, True, dropped)
        while piece is not None:
            following = next(pieces, None)
            last = following is None
            if piece.starts:
                held = is_held_out(piece, self._share)
            text = piece.text
            size = len(text) if text.isascii() else len(text.encode())
            taken, filled = taken + 1, filled + size
            if done is None:
                closes = last or filled >= SHARD_BYTES
                found = dropped if last else DroppedDocuments()
                yield _Step(unit, number, piece, size, held, closes, last, found)
            else:
                closes = taken == done.pieces
            self._tell(size)
            if closes:
                number, taken, filled = number + 1, 0, 0
                done = read_shard(self._folder, unit, number, self._layout.dtype)
            piece = following

    def _finished(self, unit: int) -> list[TokenShard]:
        """All shards of a unit, or an empty list while it is unfinished."""
        shards: list[TokenShard] = []
        while not shards or not shards[-1].last:
            shard = read_shard(self._folder, unit, len(shards), self._layout.dtype)
            if shard is None:
                return []
            shards.append(shard)
        return shards

    def _is_finished(self, unit: int) -> bool:
        return bool(self._finished(unit))

    def _wait_for(
        self, units: Iterable[int]
    ) -> tuple[list[TokenShard], dict[str, list[str]]]:
        """The shards of all units in order; makes those that others give up.

        Their dropped documents stand beside them, and only the first ones.
        """
        shards: list[TokenShard] = []
        dropped = DroppedDocuments()
        alone = False
        for unit in units:
            files = -1
            while not (found := self._finished(unit)):
                now = len(list(self._folder.glob("u*.json")))
                if now != files:
                    files, deadline = now, time.monotonic() + PATIENCE
                alone |= time.monotonic() > deadline
                if not self._make(self._claims.take([unit], alone=alone)):
                    time.sleep(0.1)
            for shard in found:
                dropped.include(shard.left_out, shard.named)
                shards.append(dataclasses.replace(shard, named={}))
        return shards, dropped.named

    def _tell(self, size: int) -> None:
        self._seen += size
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        speed = self._seen / (now - self._begun)
        total = self._source.text_bytes
        of = f" of {total / 1e6:.0f}" if total else ""
        left = f", {max(total - self._seen, 0) / speed:.0f} s left" if total else ""
        logging.info(
            "text: %s, %.0f%s MB tokenised, %.2f MB/s%s",
            self._source.name, self._seen / 1e6, of, speed / 1e6, left,
        )  # fmt: skip

    def _sum_up(self, manifest: TokenManifest) -> None:
        total = manifest.total("train") + manifest.total("held")
        logging.info(
            "text: %s tokenised: %d documents, %d tokens, %d bytes, %.2f bytes a "
            "token, %.1f s",
            self._source.name, total.documents, total.tokens, total.bytes,
            total.bytes / max(total.tokens, 1), time.monotonic() - self._begun,
        )  # fmt: skip
