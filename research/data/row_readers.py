"""The formats of row files, one reader each: `.jsonl`, `.json`, `.csv`, `.parquet`.

A row is a dictionary of columns. A plain-text format may be compressed as `.gz`,
`.bz2` or `.zst`. Errors name `file:line`. `READERS` is the list of formats.
"""

import contextlib
import csv
import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from research.core.errors import UserError
from research.data.compressed_files import (
    COMPRESSED,
    kind_of,
    open_bytes,
    skip_bytes,
)

# The library's own limit, 128 KiB, is less than a document may have.
LONGEST_FIELD = (1 << 31) - 1

Row = dict[str, Any]


class BadRowError(ValueError):
    """A row that cannot be trained on; rows of one `reason` are counted together."""

    def __init__(self, reason: str, where: str, detail: str):
        super().__init__(f"{where}: {detail}")
        self.reason = reason


class Place(NamedTuple):
    """A place in a file at which reading can start.

    Attributes:
      at: what the reader of the format needs to find the place, as JSON data: a byte,
        a row group and a row in it, an item; None for the beginning.
      number: lines or rows before it, as far as they were counted.
      skip: pieces of text behind `at` that were read already.
    """

    at: Any = None
    number: int = 0
    skip: int = 0


START = Place()


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a file is read.

    Attributes:
      errors: how bytes that are not UTF-8 are treated, as in `bytes.decode`. CSV
        always keeps them as surrogates.
      column: a format that can read one column alone reads only this one, in small
        portions, since it may be long.
      begin, end: the part that is read, in the units of `RowReader.length`; an `end`
        of None is that of the file. A row belongs to the part in which it begins.
      start: where in this part to start.
      alive: called while reading skips what lies before `start`.
    """

    errors: str = "strict"
    column: str = ""
    begin: int = 0
    end: int | None = None
    start: Place = START
    alive: Callable[[], None] = lambda: None


Located = tuple[Place, str, Row | BadRowError]


@dataclasses.dataclass(frozen=True)
class RowReader:
    """One file format.

    Attributes:
      read: yields `(place, where, row)`; see `read_located`.
      is_plain: whether the file is text. Only such a file may also be compressed as a
        whole, and only its size says how much text it holds.
      length: how many units the file has, of which a part can be read alone; None
        where only the whole file can be read.
    """

    read: Callable[[Path, Reading], Iterator[Located]]
    is_plain: bool
    length: Callable[[Path], int] | None = None


def read_rows(path: Path) -> Iterator[tuple[str, Row | BadRowError]]:
    """Yields `(where, row)` for every row, and a `BadRowError` for an unreadable one.

    Raises:
      UserError: the file is missing, unreadable or of an unknown kind.
    """
    for _, where, row in read_located(path, Reading()):
        yield where, row


def read_located(path: Path, reading: Reading) -> Iterator[Located]:
    """Yields `(place, where, row)`: reading from `place` begins with this row.

    Args:
      path: the file; its ending chooses one of `READERS`.
      reading: how, and which part.

    Raises:
      UserError: the file is missing, unreadable or of an unknown kind.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check config.data.path")
    reader = READERS.get(kind_of(path))
    if reader is None or (not reader.is_plain and path.suffix in COMPRESSED):
        plain = [kind for kind, known in READERS.items() if known.is_plain]
        raise UserError(
            f"data file {path} is of an unknown kind; it must end in "
            f"{', '.join(READERS)}; {', '.join(plain)} may also be compressed as "
            f"{', '.join(COMPRESSED)}"
        )
    try:
        yield from reader.read(path, reading)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error


def line_start(path: Path, reading: Reading) -> int:
    """The byte of the first line that begins in the part of `reading`, or its place."""
    if reading.start.at is not None or not reading.begin:
        return reading.start.at or 0
    with open(path, "rb") as file:
        file.seek(reading.begin - 1)
        return reading.begin - 1 + len(file.readline())


def _read_jsonl(path: Path, reading: Reading) -> Iterator[Located]:
    offset, number = line_start(path, reading), reading.start.number
    with open_bytes(path, offset, reading.alive) as file:
        for line in file:
            if reading.end is not None and offset >= reading.end:
                return
            # Nobody has counted the lines before a part.
            line_name = f" byte {offset}" if reading.begin else number + 1
            where = f"{path.name}:{line_name}"
            if line.strip():
                row = _parse_json_row(line, where, reading.errors)
                yield Place(offset, number), where, row
            offset, number = offset + len(line), number + 1


def _parse_json_row(line: bytes, where: str, errors: str) -> Row | BadRowError:
    try:
        row = json.loads(line.decode("utf-8-sig", errors))
    except (ValueError, RecursionError) as error:
        return BadRowError("not JSON", where, f"not a JSON object in UTF-8 ({error})")
    return _as_object(row, where)


def _as_object(row: Any, where: str) -> Row | BadRowError:
    if isinstance(row, dict):
        return row
    return BadRowError("not JSON", where, f"a JSON {type(row).__name__}, not an object")


def _read_json(path: Path, reading: Reading) -> Iterator[Located]:
    with open_bytes(path) as file:
        data = file.read()
    try:
        rows = json.loads(data.decode("utf-8-sig", reading.errors))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path.name}:{line}: not a JSON array ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}:1: a .json file must hold an array of objects")
    for number in range(reading.start.at or 0, len(rows)):
        where = f"{path.name}: item {number + 1}"
        yield Place(number, number), where, _as_object(rows[number], where)


class _CountedLines:
    """The lines of a CSV file as text; counts the bytes that were handed out.

    Lines end as Python's universal newlines do, and keep their ends.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._waiting: list[bytes] = []
        self.offset = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._waiting:
            self._waiting = self._file.readline().splitlines(keepends=True)[::-1]
        if not self._waiting:
            raise StopIteration
        line = self._waiting.pop()
        encoding = "utf-8" if self.offset else "utf-8-sig"
        self.offset += len(line)
        return line.decode(encoding, "surrogateescape")

    def skip_to(self, offset: int, alive: Callable[[], None]) -> None:
        """Continues at a byte behind those that were handed out."""
        ahead = self.offset + sum(map(len, self._waiting))
        if offset < ahead:
            while self.offset < offset:
                next(self)
            return
        skip_bytes(self._file, offset - ahead, alive)
        self._waiting, self.offset = [], offset


def _read_csv(path: Path, reading: Reading) -> Iterator[Located]:
    csv.field_size_limit(LONGEST_FIELD)
    with open_bytes(path) as file:
        lines = _CountedLines(file)
        reader = csv.DictReader(lines, strict=True)
        before = 0  # Lines that the reader has not seen.
        try:
            if reader.fieldnames and reading.start.at is not None:
                lines.skip_to(reading.start.at, reading.alive)
                before = reading.start.number - reader.line_num
            place = Place(lines.offset, before + reader.line_num)
            for row in reader:
                where = f"{path.name}:{before + reader.line_num}"
                if None in row or None in row.values():
                    detail = "not as many fields as the header"
                    yield place, where, BadRowError("not CSV", where, detail)
                else:
                    yield place, where, row
                place = Place(lines.offset, before + reader.line_num)
        except (csv.Error, UnicodeDecodeError) as error:
            line = before + reader.line_num + 1
            raise UserError(f"{path.name}:{line}: {error}") from error


def _read_parquet(path: Path, reading: Reading) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(path)) as file:
            alone = reading.column in file.schema_arrow.names
            portion = {"batch_size": 256, "columns": [reading.column]} if alone else {}
            first, done = reading.start.at or (reading.begin, 0)
            groups = file.metadata
            number = sum(groups.row_group(i).num_rows for i in range(first)) + 1
            end = groups.num_row_groups if reading.end is None else reading.end
            for group in range(first, end):
                at = 0
                for batch in file.iter_batches(row_groups=[group], **portion):
                    skipped = min(max(done - at, 0), batch.num_rows)
                    at += skipped
                    for row in batch.slice(skipped).to_pylist():
                        place = Place([group, at], number + at - 1)
                        yield place, f"{path.name}: row {number + at}", row
                        at += 1
                number, done = number + at, 0
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} is not readable parquet: {error}") from error


def _row_groups(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data file {path} is not readable parquet: {error}") from error


def file_bytes(path: Path) -> int:
    """The bytes of a file. One that is compressed can only be read as a whole: 1."""
    return 1 if path.suffix in COMPRESSED else path.stat().st_size


# A file format is a function above and a line here; all kinds of data read by it.
READERS: dict[str, RowReader] = {
    ".jsonl": RowReader(_read_jsonl, is_plain=True, length=file_bytes),
    ".json": RowReader(_read_json, is_plain=True),
    ".csv": RowReader(_read_csv, is_plain=True),
    ".parquet": RowReader(_read_parquet, is_plain=False, length=_row_groups),
}
