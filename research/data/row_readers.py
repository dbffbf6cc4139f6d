"""The formats of row files, one reader each: `.jsonl`, `.json`, `.csv`, `.parquet`.

A row is a dictionary of columns. A plain-text format may be compressed as `.gz`,
`.bz2` or `.zst`. Errors name `file:line`. `READERS` is the list of formats.
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from research.core.errors import UserError
from research.core.local_paths import no_such
from research.data.compressed_files import (
    COMPRESSED,
    file_bytes,
    kind_of,
    open_bytes,
    read_error,
    skip_bytes,
)
from research.data.file_content import refuse_other_content

# The library's own limit, 128 KiB, is less than a document may have.
LONGEST_FIELD = (1 << 31) - 1
DELIMITERS = ",;\t"

Row = dict[str, Any]


class TableRow(dict[str, Any]):
    """A row of an Arrow table. Its structs have a null for each field of others."""


class BadRowError(ValueError):
    """A row that cannot be trained on; rows of one `reason` are counted together.

    `remedy` is what the user can do, if that is neither to fix the row nor to skip it.
    """

    def __init__(self, reason: str, where: str, detail: str):
        super().__init__(f"{where}: {detail}")
        self.reason = reason
        self.detail = detail
        self.remedy = ""


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


def read_rows(path: Path, folder: str = "") -> Iterator[tuple[str, Row | BadRowError]]:
    """Yields `(where, row)` for every row, and a `BadRowError` for an unreadable one.

    Raises:
      UserError: the file is missing, unreadable or of an unknown kind.
    """
    for _, where, row in read_located(path, Reading(), folder):
        yield where, row


def read_located(path: Path, reading: Reading, folder: str = "") -> Iterator[Located]:
    """Yields `(place, where, row)`: reading from `place` begins with this row.

    Args:
      path: the file; its ending chooses one of `READERS`.
      reading: how, and which part.
      folder: stands before the file's name in `where`, such as `2024/`.

    Raises:
      UserError: the file is missing, unreadable or of an unknown kind.
    """
    if not path.is_file():
        raise no_such(f"data file {path}", path)
    reader = READERS.get(kind_of(path))
    if reader is None or (not reader.is_plain and path.suffix in COMPRESSED):
        plain = [kind for kind, known in READERS.items() if known.is_plain]
        raise UserError(
            f"data file {path} is of an unknown kind; it must end in "
            f"{', '.join(READERS)}; {', '.join(plain)} may also be compressed as "
            f"{', '.join(COMPRESSED)}"
        )
    try:
        refuse_other_content(path, reader.is_plain)
        for place, where, row in reader.read(path, reading):
            if folder and isinstance(row, BadRowError):
                row = BadRowError(row.reason, f"{folder}{where}", row.detail)
            yield place, f"{folder}{where}", row
    except (OSError, EOFError, zlib.error) as error:
        raise read_error(path, error) from error


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
        row = json.loads(line.decode("utf-8-sig", errors), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return BadRowError("not JSON", where, f"not a JSON object in UTF-8 ({error})")
    return _as_object(row, where)


class _Repeated(dict[str, Any]):
    """An object of JSON in which, or within which, a key is there twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    inner = (x for v in found.values() for x in (v if type(v) is list else (v,)))
    repeated = len(found) < len(pairs) or any(type(x) is _Repeated for x in inner)
    return _Repeated(found) if repeated else found


def _as_object(row: Any, where: str) -> Row | BadRowError:
    if isinstance(row, _Repeated):
        return BadRowError("not JSON", where, "an object has two keys of one name")
    if isinstance(row, dict):
        return row
    return BadRowError("not JSON", where, f"a JSON {type(row).__name__}, not an object")


def _read_json(path: Path, reading: Reading) -> Iterator[Located]:
    """Reads an array of objects; a file with an object in each line counts as one."""
    with open_bytes(path) as file:
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \r\n\t")), b"")
    if isinstance(_parse_json_row(first, "", reading.errors), dict):
        yield from _read_jsonl(path, reading)
        return
    with open_bytes(path) as file:
        data = file.read()
    try:
        # Each row with such bytes is refused by itself.
        text = data.decode("utf-8-sig", "surrogateescape")
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path.name}:{line}: not a JSON array ({error})") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path.name}:1: a .json file must hold an array of objects, or an object "
            f"in each line, and not one {type(rows).__name__}"
        )
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
        self._row: list[bytes] = []
        self.offset = 0
        self.count = 0

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
        self.count += 1
        self._row.append(line)
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

    def begin_row(self) -> None:
        """Forgets the lines of the row before."""
        self._row.clear()

    def retry_row(self) -> int:
        """Takes back all lines of the row but its first; returns their number.

        A quote that is never closed makes all that follows one row.
        """
        back = self._row[:0:-1]
        self._waiting += back
        self.offset -= sum(map(len, back))
        return len(back)


def _read_csv(path: Path, reading: Reading) -> Iterator[Located]:
    csv.field_size_limit(LONGEST_FIELD)
    with open_bytes(path) as file:
        lines = _CountedLines(file)
        head = next(lines, "")
        lines.begin_row()
        names, delimiter = _csv_header(path, itertools.chain([head], lines))
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        number = lines.count  # Lines that were read.
        if names and reading.start.at is not None:
            lines.skip_to(reading.start.at, reading.alive)
            number = reading.start.number
        while True:
            place, at = Place(lines.offset, number), reader.line_num
            lines.begin_row()
            try:
                cells = next(reader, None)
                back, bad = 0, ""
            except csv.Error as error:
                cells, back, bad = [], lines.retry_row(), str(error)
            if cells is None:
                return
            number += reader.line_num - at - back
            if cells and len(cells) != len(names):
                bad = "not as many fields as the header"
            where = f"{path.name}:{place.number + 1}"  # A row may have several lines.
            if bad:
                yield place, where, BadRowError("not CSV", where, bad)
            elif cells:
                yield place, where, dict(zip(names, cells, strict=True))


def _csv_header(path: Path, lines: Iterator[str]) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter that gives the most of them.

    Raises:
      UserError: the header is no CSV, or names a column twice.
    """
    head = next(lines)
    rest = itertools.chain([head], lines)
    try:
        delimiter = max(
            DELIMITERS, key=lambda mark: len(next(csv.reader([head], delimiter=mark)))
        )
        names = next(csv.reader(rest, strict=True, delimiter=delimiter), [])
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{path.name}:1: no header of CSV: {error}") from error
    if again := [name for i, name in enumerate(names) if name and name in names[:i]]:
        raise UserError(
            f"{path.name}:1: two columns are named {again[0]!r}; rename or remove one"
        )
    return names, delimiter


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
                    for row in _batch_rows(batch.slice(skipped)):
                        place = Place([group, at], number + at - 1)
                        where = f"{path.name}: row {number + at}"
                        if isinstance(row, UnicodeDecodeError):
                            row = BadRowError("not UTF-8", where, str(row))
                        yield place, where, row
                        at += 1
                number, done = number + at, 0
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {path} is not readable parquet: {error}") from error


def _batch_rows(batch: Any) -> Iterator[Row | UnicodeDecodeError]:
    """The rows of an Arrow batch; an error in place of one that is not UTF-8."""
    try:
        yield from map(TableRow, batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error
            return
        for number in range(batch.num_rows):
            yield from _batch_rows(batch.slice(number, 1))


def _row_groups(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data file {path} is not readable parquet: {error}") from error


# A file format is a function above and a line here; all kinds of data read by it.
# By `config.data.bad_lines`, whether a line that cannot be read ends the run.
STOPS = {"stop": True, "skip": False}
READERS: dict[str, RowReader] = {
    ".jsonl": RowReader(_read_jsonl, is_plain=True, length=file_bytes),
    ".json": RowReader(_read_json, is_plain=True),
    ".csv": RowReader(_read_csv, is_plain=True),
    ".parquet": RowReader(_read_parquet, is_plain=False, length=_row_groups),
}
