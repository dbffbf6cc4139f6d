"""Reads the documents of a source of raw text, one piece at a time.

A document is a plain-text file, or one row of a row file. A long document comes in
pieces that are cut at line ends, so that memory does not depend on the size of a file.
A plain-text file that is a source by itself is cut into many documents at line ends,
because a single document could not be split into training and held-out text.
"""

import codecs
import collections
import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from research.core.errors import UserError, nearest
from research.data.compressed_files import COMPRESSED, kind_of, open_bytes
from research.data.row_readers import READERS, BadRowError, read_rows

PIECE_BYTES = 128 << 10
PART_BYTES = 16 << 10  # A document of a file that is a source by itself.
HEAD_BYTES = 4096  # A binary file has a NUL byte among the first so many.
RECORD_FILES = (".array_record", ".arrayrecord")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class DocumentPiece:
    """A part of a document, of about `PIECE_BYTES` at most; never empty.

    Attributes:
      text: its characters.
      starts, ends: whether it is the first and the last of its document.
      where: `file:line`, for messages to the user.
    """

    text: str
    starts: bool
    ends: bool
    where: str


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
      name: relative to the source's folder; a hub dataset counts as one file.
      path: its place on disk, or the hub address.
      size: bytes on disk; 0 on the hub.
    """

    name: str
    path: Path
    size: int


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
    """

    name: str
    where: str
    files: tuple[SourceFile, ...]
    revision: str
    column: str
    undecodable: str
    bad_lines: str

    @property
    def is_folder(self) -> bool:
        return not Path(self.where).expanduser().is_file()

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text there are; 0 where the sizes do not tell."""
        plain = all(_is_plain(item.path) for item in self.files)
        return sum(i.size for i in self.files) if plain else 0

    def read(
        self, files: Iterable[SourceFile], left_out: collections.Counter[str]
    ) -> Iterator[DocumentPiece]:
        """Reads the documents of some of the `files`, and counts those that it drops.

        Raises:
          UserError: something cannot be read, or is not text and must not be skipped.
        """
        reading = _DocumentReader(self, left_out)
        for item in files:
            yield from reading.pieces(item)


def _is_plain(path: Path) -> bool:
    """Whether a file is about as large as the text in it."""
    reader = READERS.get(path.suffix)
    known = reader.is_plain if reader else path.suffix not in RECORD_FILES
    return known and path.suffix not in COMPRESSED


def hub_parts(where: str) -> tuple[str, str, str]:
    """`hub://owner/name[:subset][@split]` as owner/name, subset or "", split."""
    rest, _, split = where.removeprefix("hub://").partition("@")
    name, _, subset = rest.partition(":")
    return name, subset, split or "train"


class _DocumentReader:
    """One pass over files: cuts each kind of file into pieces."""

    def __init__(self, source: TextSource, left_out: collections.Counter[str]):
        self._source = source
        self._left_out = left_out

    def pieces(self, item: SourceFile) -> Iterator[DocumentPiece]:
        kind = kind_of(item.path)
        if self._source.revision:
            yield from self._of_rows(self._hub_rows())
        elif kind in READERS:
            rows = read_rows(
                item.path, errors="surrogateescape", column=self._source.column
            )
            yield from self._of_row_file(rows)
        elif kind in RECORD_FILES:
            yield from self._of_records(item)
        else:
            try:
                yield from self._of_plain_text(item)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{item.path} cannot be read: {error}") from error

    def _of_row_file(self, rows: Iterable[tuple[str, Any]]) -> Iterator[DocumentPiece]:
        """Reads a row file; one in a folder may hold no text, such as settings.json."""
        try:
            yield from self._of_rows(rows)
        except UserError:
            if not self._source.is_folder or self._source.bad_lines == "stop":
                raise
            self._left_out["no rows with the text column"] += 1

    def _of_rows(self, rows: Iterable[tuple[str, Any]]) -> Iterator[DocumentPiece]:
        column = self._source.column
        for where, row in rows:
            if not isinstance(row, BadRowError) and column not in row:
                raise UserError(
                    f"{where}: no column {column!r} for config.text.column"
                    f"{nearest(column, row)}; the row has {', '.join(map(repr, row))}"
                )
            text = row if isinstance(row, BadRowError) else row[column]
            if not isinstance(text, str):
                self._bad_row(text, where)
                continue
            text = text.removeprefix("\ufeff")
            if not text.isascii() and SURROGATE.search(text):
                if not self._keep(where, "is not UTF-8"):
                    continue
                text = SURROGATE.sub("\ufffd", text)
            yield from self._of_text(text, where)

    def _bad_row(self, found: Any, where: str) -> None:
        """Raises an error for a row without text, or counts it."""
        bad = found
        if not isinstance(found, BadRowError):
            detail = f"{self._source.column} is {type(found).__name__}, not text"
            bad = BadRowError("wrong type", where, detail)
        if self._source.bad_lines == "stop":
            raise UserError(
                f"{bad}; fix it, or skip and count such rows with "
                "--config.data.bad_lines=skip"
            )
        self._left_out[bad.reason] += 1

    def _keep(self, where: str, what: str) -> bool:
        """Whether to keep a document that is not valid UTF-8; counts it if not."""
        if self._source.undecodable == "stop":
            raise UserError(
                f"{where}: {what}; fix it, or choose --config.text.undecodable=skip "
                "or replace"
            )
        if self._source.undecodable == "skip":
            self._left_out["not UTF-8"] += 1
        return self._source.undecodable == "replace"

    def _of_text(self, text: str, where: str) -> Iterator[DocumentPiece]:
        """Cuts a document that is in memory already."""
        if not text:
            self._left_out["empty"] += 1
        yield from _in_pieces([text], where, PIECE_BYTES)

    def _of_plain_text(self, item: SourceFile) -> Iterator[DocumentPiece]:
        policy = self._source.undecodable
        with open_bytes(item.path) as file:
            head = file.read(HEAD_BYTES)
        if not head:
            self._left_out["empty"] += 1
        elif b"\0" in head and self._source.is_folder:
            self._left_out["binary file"] += 1
        elif policy == "skip" and not _decodes(item.path):
            self._left_out["not UTF-8"] += 1
        else:
            errors = "replace" if policy == "replace" else "strict"
            try:
                chunks = _decoded(item.path, errors)
                if self._source.is_folder:
                    yield from _in_pieces(chunks, item.name, PIECE_BYTES)
                else:
                    yield from _in_parts(chunks, item.name)
            except _UndecodableError as bad:
                self._keep(f"{item.name}:{bad.offset}", "a byte here is not UTF-8")

    def _of_records(self, item: SourceFile) -> Iterator[DocumentPiece]:
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(item.path))
        if not reader.ok():
            raise UserError(f"{item.path} cannot be read: it is no array_record file")
        for number in range(1, reader.num_records() + 1):
            where = f"{item.name}: record {number}"
            record = reader.read()
            try:
                text = record.decode("utf-8")
            except UnicodeDecodeError as error:
                if not self._keep(where, f"byte {error.start} is not UTF-8"):
                    continue
                text = record.decode("utf-8", "replace")
            yield from self._of_text(text, where)
        reader.close()

    def _hub_rows(self) -> Iterator[tuple[str, Any]]:
        import datasets

        name, subset, split = hub_parts(self._source.where)
        try:
            rows = datasets.load_dataset(
                name,
                subset or None,
                split=split,
                revision=self._source.revision,
                streaming=True,
            )
            for number, row in enumerate(rows, start=1):
                yield f"{name}: row {number}", row
        except Exception as error:  # The hub's client raises a dozen unrelated kinds.
            raise UserError(
                f"text source {self._source.name}={self._source.where} cannot be read "
                f"({error}); check its subset and split, or give local files"
            ) from error


class _UndecodableError(ValueError):
    """The byte at `offset` of the decompressed file is not UTF-8."""

    def __init__(self, offset: int):
        super().__init__(offset)
        self.offset = offset


def _decoded(path: Path, errors: str) -> Iterator[str]:
    """The text of a file in chunks, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    position = 0
    with open_bytes(path) as file:
        while True:
            block = file.read(PIECE_BYTES)
            begun = position - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _UndecodableError(begun + error.start) from error
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(block)
            if not block:
                return


def _decodes(path: Path) -> bool:
    try:
        collections.deque(_decoded(path, "strict"), maxlen=0)
    except _UndecodableError:
        return False
    return True


def _in_parts(chunks: Iterable[str], where: str) -> Iterator[DocumentPiece]:
    """Cuts one file into documents of about `PART_BYTES`."""
    for piece in _in_pieces(chunks, where, PART_BYTES):
        yield dataclasses.replace(piece, starts=True, ends=True)


def _in_pieces(chunks: Iterable[str], where: str, size: int) -> Iterator[DocumentPiece]:
    """Cuts one document behind line ends, else behind spaces, else anywhere."""
    rest, starts = "", True
    for chunk in chunks:
        text, at = rest + chunk, 0
        while len(text) - at > size:
            most = at + size
            end = (
                text.rfind("\n", at, most) + 1 or text.rfind(" ", at, most) + 1 or most
            )
            yield DocumentPiece(text[at:end], starts, False, where)
            starts, at = False, end
        rest = text[at:]
    if rest:
        yield DocumentPiece(rest, starts, True, where)
