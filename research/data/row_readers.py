"""The formats of row files, one reader each: `.jsonl`, `.json`, `.csv`, `.parquet`.

A row is a dictionary of columns. A plain-text format may be compressed as `.gz`,
`.bz2` or `.zst`. Errors name `file:line`. `READERS` is the list of formats.
"""

import contextlib
import csv
import dataclasses
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.data.compressed_files import COMPRESSED, kind_of, open_bytes

# The library's own limit, 128 KiB, is less than a document may have.
LONGEST_FIELD = (1 << 31) - 1

Row = dict[str, Any]


class BadRowError(ValueError):
    """A row that cannot be trained on; rows of one `reason` are counted together."""

    def __init__(self, reason: str, where: str, detail: str):
        super().__init__(f"{where}: {detail}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class RowReader:
    """One file format.

    Attributes:
      read: `read(path, errors, column)` yields `(where, row)`; see `read_rows`.
      is_plain: whether the file is text. Only such a file may also be compressed as a
        whole, and only its size says how much text it holds.
    """

    read: Callable[[Path, str, str], Iterator[tuple[str, "Row | BadRowError"]]]
    is_plain: bool


def read_rows(
    path: Path, *, errors: str = "strict", column: str = ""
) -> Iterator[tuple[str, Row | BadRowError]]:
    """Yields `(where, row)` for every row, and a `BadRowError` for an unreadable one.

    Args:
      path: the file; its ending chooses one of `READERS`.
      errors: how bytes that are not UTF-8 are treated, as in `bytes.decode`. CSV
        always keeps them as surrogates.
      column: a format that can read one column alone reads only this one, in small
        portions, since it may be long.

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
        yield from reader.read(path, errors, column)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error


def _read_jsonl(
    path: Path, errors: str, column: str
) -> Iterator[tuple[str, Row | BadRowError]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            if line.strip():
                yield where, _parse_json_row(line, where, errors)


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


def _read_json(
    path: Path, errors: str, column: str
) -> Iterator[tuple[str, Row | BadRowError]]:
    with open_bytes(path) as file:
        data = file.read()
    try:
        rows = json.loads(data.decode("utf-8-sig", errors))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path.name}:{line}: not a JSON array ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}:1: a .json file must hold an array of objects")
    for number, row in enumerate(rows, start=1):
        where = f"{path.name}: item {number}"
        yield where, _as_object(row, where)


def _read_csv(
    path: Path, errors: str, column: str
) -> Iterator[tuple[str, Row | BadRowError]]:
    csv.field_size_limit(LONGEST_FIELD)
    with (
        open_bytes(path) as file,
        io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
    ):
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    detail = "not as many fields as the header"
                    yield where, BadRowError("not CSV", where, detail)
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            line = reader.line_num + 1
            raise UserError(f"{path.name}:{line}: {error}") from error


def _read_parquet(path: Path, errors: str, column: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with contextlib.closing(pyarrow.parquet.ParquetFile(path)) as file:
            alone = column in file.schema_arrow.names
            portion = {"batch_size": 256, "columns": [column]} if alone else {}
            for batch in file.iter_batches(**portion):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}: row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} is not readable parquet: {error}") from error


# A file format is a function above and a line here; all kinds of data read by it.
READERS: dict[str, RowReader] = {
    ".jsonl": RowReader(_read_jsonl, is_plain=True),
    ".json": RowReader(_read_json, is_plain=True),
    ".csv": RowReader(_read_csv, is_plain=True),
    ".parquet": RowReader(_read_parquet, is_plain=False),
}
