"""Reads the documents of a source of raw text, one piece at a time.

A document is a plain-text file, or one row of a row file. A long document comes in
pieces that are cut at line ends, so that memory does not depend on the size of a file.
A plain-text file that is a source by itself is cut into many documents at line ends,
because a single document could not be split into training and held-out text.
"""

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError, look_up, nearest
from research.core.hub_access import HubAddress
from research.core.local_paths import local_path
from research.data.compressed_files import COMPRESSED, file_bytes, kind_of, open_bytes
from research.data.document_pieces import (
    Chunks,
    DocumentPiece,
    UndecodableError,
    cut_pieces,
    read_chunks,
    split_at,
)
from research.data.dropped_documents import DroppedDocuments
from research.data.hub_rows import HubRows
from research.data.row_readers import (
    READERS,
    START,
    STOPS,
    BadRowError,
    Located,
    Place,
    Reading,
    Row,
    read_located,
)

PIECE_BYTES = 128 << 10
PART_BYTES = 16 << 10  # A document of a file that is a source by itself.
HEAD_BYTES = 4096  # A binary file has a NUL byte among the first so many.
RECORD_FILES = (".array_record", ".arrayrecord")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source, or a part of it.

    Attributes:
      name: relative to the source's folder; a hub dataset counts as one file.
      path: its place on disk, or the hub address.
      size: bytes on disk; 0 on the hub.
      begin, end: the part, as in `Reading`; on the hub in shards of the dataset.
    """

    name: str
    path: Path
    size: int
    begin: int = 0
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One source of text, as `config.text.sources` names it.

    Attributes:
      name: the name that the user gave.
      where: the place that the user wrote behind the name.
      files: its files, in the order of their names.
      revision: the commit of a hub dataset, else "".
      column: the column of row files that holds the text.
      undecodable: stop, skip or replace.
      bad_lines: stop or skip.
      hard_cut: letters that end a document wherever they stand; "" for none.
    """

    name: str
    where: str
    files: tuple[SourceFile, ...]
    revision: str
    column: str
    undecodable: str
    bad_lines: str
    hard_cut: str = ""

    @property
    def is_folder(self) -> bool:
        return not local_path(self.where).is_file()

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text there are; 0 where the sizes do not tell."""
        plain = all(_is_plain(item.path) for item in self.files)
        return sum(i.size for i in self.files) if plain else 0

    def read(
        self,
        files: Iterable[SourceFile],
        dropped: DroppedDocuments | None = None,
        start: Place = START,
        alive: Callable[[], None] = lambda: None,
    ) -> Iterator[DocumentPiece]:
        """Reads the documents of some of the `files`, and notes those that it drops.

        Args:
          files: some of `files`, or of their `parts`.
          dropped: gets them.
          start: the place in the first file at which to start; its `skip` is ignored.
          alive: called while what lies before `start` is skipped.

        Raises:
          UserError: something cannot be read, or is not text and must not be skipped.
        """
        reading = _DocumentReader(self, dropped or DroppedDocuments(), alive)
        for item in files:
            yield from reading.pieces(item, start)
            start = START

    @property
    def hub_address(self) -> HubAddress:
        """The address of a hub dataset, without its revision."""
        address = HubAddress.parse(self.where, "dataset")
        return dataclasses.replace(address, revision="")

    @functools.cached_property
    def hub_rows(self) -> HubRows:
        """The rows of a hub dataset."""
        address = dataclasses.replace(self.hub_address, revision=self.revision)
        return HubRows(address, f"text source {self.name}={self.where}")

    @property
    def units(self) -> Sequence[SourceFile]:
        """The files; of a hub dataset its shards, which the hub names."""
        if not self.revision:
            return self.files
        (whole,) = self.files
        return [
            dataclasses.replace(whole, begin=i, end=i + 1)
            for i in range(self.hub_rows.num_shards)
        ]

    def parts(self, item: SourceFile, count: int) -> list[SourceFile]:
        """About `count` equal parts of a file, or the whole where it has no parts.

        A compressed file, a CSV file, a JSON array and a file that is one document can
        only be read from their beginning.
        """
        if count < 2:
            return [item]
        kind = kind_of(item.path)
        if kind in READERS:
            length = READERS[kind].length
            units = length(item.path) if length else 1
        elif kind in RECORD_FILES:
            units = _open_records(item.path).num_records()
        else:
            # With `skip`, the whole file decides whether any of it is used.
            whole = self.is_folder or self.hard_cut or self.undecodable == "skip"
            units = 1 if whole else file_bytes(item.path)
        count = min(count, units)
        if count < 2:
            return [item]
        cuts = [number * units // count for number in range(count + 1)]
        size = item.size // count
        return [
            dataclasses.replace(item, size=size, begin=begin, end=end)
            for begin, end in itertools.pairwise(cuts)
        ]


def _is_plain(path: Path) -> bool:
    """Whether a file is about as large as the text in it."""
    reader = READERS.get(path.suffix)
    known = reader.is_plain if reader else path.suffix not in RECORD_FILES
    return known and path.suffix not in COMPRESSED


class _DocumentReader:
    """One pass over files: cuts each kind of file into pieces."""

    def __init__(
        self,
        source: TextSource,
        dropped: DroppedDocuments,
        alive: Callable[[], None],
    ):
        self._source = source
        self._dropped = dropped
        self._alive = alive

    def pieces(self, item: SourceFile, start: Place) -> Iterator[DocumentPiece]:
        kind = kind_of(item.path)
        reading = Reading(
            "surrogateescape", self._source.column, item.begin, item.end, start,
            self._alive,
        )  # fmt: skip
        if self._source.revision:
            yield from self._of_rows(self._source.hub_rows.read(reading))
        elif kind in READERS:
            yield from self._of_rows(self._rows_of_file(item, reading))
        elif kind in RECORD_FILES:
            yield from self._of_records(item, reading)
        else:
            try:
                yield from self._of_plain_text(item, reading)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{item.path} cannot be read: {error}") from error

    def _rows_of_file(self, item: SourceFile, reading: Reading) -> Iterator[Located]:
        """Reads a row file; one in a folder may be none, such as settings.json."""
        folder = item.name.removesuffix(item.path.name)
        try:
            yield from read_located(item.path, reading, folder)
        except UserError as error:
            if not self._source.is_folder or self._stops_at_bad_rows():
                raise
            self._dropped.add("unreadable file", f"{item.name}: {error}")

    def _of_rows(self, rows: Iterable[Located]) -> Iterator[DocumentPiece]:
        for place, where, row in rows:
            text = self._text_of(row, where)
            if isinstance(text, BadRowError):
                self._bad_row(text)
                continue
            text = text.removeprefix("\ufeff")
            if not text.isascii() and SURROGATE.search(text):
                if not self._keep(where, "is not UTF-8"):
                    continue
                text = SURROGATE.sub("\ufffd", text)
            yield from self._of_text(text, where, place)

    def _stops_at_bad_rows(self) -> bool:
        return look_up(STOPS, self._source.bad_lines, "config.data.bad_lines")

    def _text_of(self, row: Row | BadRowError, where: str) -> str | BadRowError:
        column = self._source.column
        if isinstance(row, BadRowError):
            return row
        if column not in row:
            detail = (
                f"no column {column!r} for config.text.column{nearest(column, row)}; "
                f"the row has {', '.join(map(repr, row))}"
            )
            return BadRowError("no text column", where, detail)
        text = row[column]
        if isinstance(text, str):
            return text
        detail = f"{column} is {type(text).__name__}, not text"
        return BadRowError("wrong type", where, detail)

    def _bad_row(self, bad: BadRowError) -> None:
        """Raises an error for a row without text, or notes it."""
        if self._stops_at_bad_rows():
            raise UserError(
                f"{bad}; fix it, or skip and count such rows with "
                "--config.data.bad_lines=skip"
            )
        self._dropped.add(bad.reason, str(bad))

    def _keep(self, where: str, what: str) -> bool:
        """Whether to keep a document that is not valid UTF-8; notes it if not."""
        ways = {"stop": None, "skip": False, "replace": True}
        kept = look_up(ways, self._source.undecodable, "config.text.undecodable")
        if kept is None:
            raise UserError(
                f"{where}: {what}; fix it, or choose --config.text.undecodable=skip "
                "or replace"
            )
        if not kept:
            self._dropped.add("not UTF-8", f"{where}: {what}")
        return kept

    def _of_text(self, text: str, where: str, at: Place) -> Iterator[DocumentPiece]:
        """Cuts a document that is in memory already and begins at `at`."""
        if not text:
            self._dropped.add("empty", f"{where}: empty")
        mark, chunks = self._source.hard_cut, [((0, 0), text)]
        pieces = cut_pieces(chunks, where, PIECE_BYTES, mark=mark)
        for number, piece in enumerate(split_at(mark, pieces)):
            yield dataclasses.replace(piece, place=at._replace(skip=number))

    def _of_plain_text(
        self, item: SourceFile, reading: Reading
    ) -> Iterator[DocumentPiece]:
        if reading.start.at is None and not self._is_wanted(item):
            return
        errors = "replace" if self._source.undecodable == "replace" else "strict"
        try:
            chunks = read_chunks(item.path, errors, reading, PIECE_BYTES)
            mark = self._source.hard_cut
            if self._source.is_folder or mark:
                starts = not any(reading.start.at or ())
                pieces = cut_pieces(chunks, item.name, PIECE_BYTES, starts, mark)
                yield from split_at(mark, pieces)
            else:
                yield from _in_parts(chunks, item.name)
        except UndecodableError as bad:
            self._keep(*_place_and_fault(item, bad))

    def _is_wanted(self, item: SourceFile) -> bool:
        """Whether a plain file holds text; notes it if it does not."""
        with open_bytes(item.path) as file:
            head = file.read(HEAD_BYTES)
        if not head:
            self._dropped.add("empty", f"{item.name}:1: empty")
        elif (zero := head.find(b"\0")) >= 0 and self._source.is_folder:
            said = f"{item.name}: byte {zero} is zero, so this is a binary file"
            self._dropped.add("binary file", said)
        else:
            return self._source.undecodable != "skip" or self._decodes(item)
        return False

    def _decodes(self, item: SourceFile) -> bool:
        try:
            for _ in read_chunks(item.path, "strict", Reading(), PIECE_BYTES):
                self._alive()
        except UndecodableError as bad:
            return bool(self._keep(*_place_and_fault(item, bad)))
        return True

    def _of_records(
        self, item: SourceFile, reading: Reading
    ) -> Iterator[DocumentPiece]:
        reader = _open_records(item.path)
        first = reading.begin if reading.start.at is None else reading.start.at
        end = reader.num_records() if reading.end is None else reading.end
        reader.seek(first)
        for number in range(first, end):
            where = f"{item.name}: record {number + 1}"
            record = reader.read()
            try:
                text = record.decode("utf-8")
            except UnicodeDecodeError as error:
                if not self._keep(where, f"byte {error.start} is not UTF-8"):
                    continue
                text = record.decode("utf-8", "replace")
            yield from self._of_text(text, where, Place(number, number))
        reader.close()


def _place_and_fault(item: SourceFile, bad: UndecodableError) -> tuple[str, str]:
    line = _line_of(item.path, bad.offset)
    return f"{item.name}:{line}", f"byte {bad.offset} of the file is not UTF-8"


def _line_of(path: Path, offset: int) -> int:
    """The number of the line that has the byte at `offset`, from 1."""
    with open_bytes(path) as file:
        blocks = iter(lambda: file.read(PIECE_BYTES), b"")
        line, left = 1, offset
        for block in blocks:
            line += block.count(b"\n", 0, max(left, 0))
            left -= len(block)
            if left <= 0:
                break
    return line


def _open_records(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if not reader.ok():
        raise UserError(f"{path} cannot be read: it is no array_record file")
    return reader


def _in_parts(chunks: Chunks, where: str) -> Iterator[DocumentPiece]:
    """Cuts one file into documents of about `PART_BYTES`."""
    for piece in cut_pieces(chunks, where, PART_BYTES):
        yield dataclasses.replace(piece, starts=True, ends=True)
