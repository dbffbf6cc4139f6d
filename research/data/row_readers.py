"""Rows as people write them: the record every source is turned into, and readers.

A file may be `.jsonl`, `.json` (one array), `.csv` or `.parquet`, the first three
also with `.gz`, `.bz2` or `.zst`. What is wrong with a row is said as `file:line`.
"""

import contextlib
import csv
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from research.config.run_config import ColumnsConfig
from research.core.errors import UserError, nearest
from research.data.compressed_files import COMPRESSED, kind_of, open_bytes
from research.tokenize.conversation import ROLES, Record, Turn

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
# The library's own limit, 128 KiB, is less than a document may have.
LONGEST_FIELD = (1 << 31) - 1


class BadRowError(ValueError):
    """A row that cannot be trained on; `reason` is what such rows are counted by."""

    def __init__(self, reason: str, where: str, detail: str):
        super().__init__(f"{where}: {detail}")
        self.reason = reason


def read_rows(
    path: Path, *, errors: str = "strict", column: str = ""
) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    """Yields `(where, row)` for every row; a `BadRowError` is an unreadable one.

    Args:
      path: the file.
      errors: what becomes of bytes that are not UTF-8, as in `bytes.decode`; in CSV
        they are always kept as surrogates.
      column: where a format can read one column alone, read only this one, and in
        small portions, since it may be long.

    Raises:
      UserError: the file is missing, unreadable or of an unknown kind.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check config.data.path")
    kind = kind_of(path)
    if kind not in FORMATS or (kind == ".parquet" and path.suffix in COMPRESSED):
        raise UserError(
            f"data file {path} is of an unknown kind; it must end in "
            f"{', '.join(FORMATS)}, the first three also with {', '.join(COMPRESSED)}"
        )
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, column)
            return
        with open_bytes(path) as file:
            if kind == ".csv":
                yield from _read_csv(file, path.name)
            else:
                read = {".jsonl": _read_jsonl, ".json": _read_json}[kind]
                yield from read(file, path.name, errors)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error


def _read_jsonl(
    file: Iterable[bytes], name: str, errors: str
) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        where = f"{name}:{number}"
        if line.strip():
            yield where, _parse_json_row(line, where, errors)


def _parse_json_row(
    line: bytes, where: str, errors: str
) -> dict[str, Any] | BadRowError:
    try:
        row = json.loads(line.decode("utf-8-sig", errors))
    except (ValueError, RecursionError) as error:
        return BadRowError("not JSON", where, f"not a JSON object in UTF-8 ({error})")
    return _as_object(row, where)


def _as_object(row: Any, where: str) -> dict[str, Any] | BadRowError:
    if isinstance(row, dict):
        return row
    return BadRowError("not JSON", where, f"a JSON {type(row).__name__}, not an object")


def _read_json(file: Any, name: str, errors: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig", errors))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{name}:{line}: not a JSON array ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{name}:1: a .json file must hold an array of objects")
    for number, row in enumerate(rows, start=1):
        where = f"{name}: item {number}"
        yield where, _as_object(row, where)


def _read_csv(file: Any, name: str) -> Iterator[tuple[str, Any]]:
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(text, strict=True)
    try:
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if None in row or None in row.values():
                yield (
                    where,
                    BadRowError("not CSV", where, "not as many fields as the header"),
                )
            else:
                yield where, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{name}:{reader.line_num + 1}: {error}") from error
    finally:
        text.detach()  # The caller opened the file, and closes it.


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
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


def to_record(row: dict[str, Any], columns: ColumnsConfig, where: str) -> Record:
    """Maps a row's columns to a `Record`.

    Raises:
      UserError: a mapped column does not exist (the mapping is wrong, not the row).
      BadRowError: this row cannot be used: wrong types, or an empty answer.
    """
    if columns.messages in row and columns.response not in row:
        turns, context = _chat_turns(row[columns.messages], where), ""
    else:
        for field in ("instruction", "response"):
            _require(row, getattr(columns, field), field, where)
        turns = (
            Turn("user", _text(row, columns.instruction, where)),
            Turn("assistant", _text(row, columns.response, where)),
        )
        context = _text(row, columns.context, where)
        if not turns[0].text and not context:
            raise BadRowError(
                "empty instruction", where, "instruction and context are empty"
            )
    if not all(turn.text for turn in turns if turn.role == "assistant"):
        raise BadRowError("empty response", where, "a response is empty")
    return Record(turns, context, _text(row, columns.category, where), where)


def _require(row: dict[str, Any], column: str, field: str, where: str) -> None:
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r} for config.data.columns.{field}"
            f"{nearest(column, row)}; the row has {', '.join(map(repr, row))}"
        )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRowError(
            "wrong type", where, f"{column} is {type(value).__name__}, not text"
        )
    # A lone surrogate is legal JSON and no legal text: no tokenizer takes it.
    if not value.isascii() and value != value.encode("utf-8", "replace").decode():
        raise BadRowError("not Unicode", where, f"{column} has a lone surrogate")
    return value.strip()


def _chat_turns(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise BadRowError("wrong type", where, "messages is not a list of messages")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRowError(
                "wrong type", where, f"a message needs a role of {', '.join(ROLES)}"
            )
        turns.append(Turn(message["role"], _text(message, "content", where)))
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadRowError(
            "not alternating",
            where,
            f"messages must alternate user and assistant, not {' '.join(roles)}",
        )
    return tuple(turns)
