"""`metrics.jsonl` and TensorBoard: one line or point per step and evaluation.

A line is flat, and a field has one type: a value by group is a field of its own, such
as `loss/open_qa`, and a value that is not known is no field. JSON has no number that is
not finite. Such a number stands as a string under another name, `"not_finite/loss":
"NaN"`, and `read_metrics` gives the number back.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.core.atomic_files import sync, write_whole
from research.core.json_files import (
    NUMBER,
    mismatch,
    read_json_lines,
    read_to_rewrite,
)
from research.data.grouped_values import group_fields
from research.runs.tensorboard_file import TensorBoard
from research.runs.utc_clock import utc_now

NAME = "metrics.jsonl"
LINE = {"step": int, "kind": str}
# Reports read these fields in a line of each kind.
FIELDS = {
    "train": {
        "loss": NUMBER,
        "tokens": NUMBER,
        "elapsed_s": NUMBER,
        "memory_gb": NUMBER,
    },
    "eval": {"loss": NUMBER},
}
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
OF_NOT_FINITE = "not_finite/"
# Earlier versions nested the values by group, under names of their own.
NESTED = {
    "by_group": "loss",
    "bits_by_group": "bits_per_byte",
    "grad_norm_by_path": "grad_norm",
}


class MetricsFile:
    """`metrics.jsonl` (one JSON object per line, each with `step`) and TensorBoard."""

    def __init__(
        self, folder: Path, first_step: int, settings: Mapping[str, Any] | None = None
    ):
        """Opens both files and drops everything after `first_step`.

        A run that begins at step 0 drops all lines: it evaluates step 0 again. If lines
        cannot be read, a copy of the file is kept. Lines of an earlier version become
        those of this one, so a file never mixes two forms.

        Args:
          folder: the run directory.
          first_step: the updates that the run has made.
          settings: hyperparameters by name, for TensorBoard.
        """
        self._path = folder / NAME
        known = read_to_rewrite(self._path, LINE)
        kept = [_flat(line) for line in known if 0 < first_step >= line["step"]]
        write_whole(self._path, "".join(map(_format_line, kept)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = TensorBoard(folder / "tensorboard", first_step, settings or {})

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends `values`: numbers, strings, and None for what is not known.

        A string is written into the line alone: TensorBoard draws numbers.

        Raises:
          OSError: the line cannot be written, or its file is no longer in the folder.
        """
        self._require_place()
        self._file.write(_format_line(_stamped(step, kind, values)))
        self._file.flush()
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, NUMBER)
        }
        self._board.write(step, numbers)

    def sync(self) -> None:
        """Waits until all lines would survive a power loss. Raises OSError."""
        self._require_place()
        os.fsync(self._file.fileno())

    def _require_place(self) -> None:
        """Lines in a file without a name would be lost, and a save would make the
        folder anew."""
        try:
            here = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            here = False
        if not here:
            raise FileNotFoundError(
                f"{self._path} was moved, replaced or removed while the run wrote it"
            )

    def close(self) -> None:
        """Writes the lines that are still buffered. Raises OSError if it cannot."""
        self._board.close()
        self._file.close()


def append_line(folder: Path, step: int, kind: str, values: dict[str, Any]) -> None:
    """Appends to a `metrics.jsonl` that no run has open, and syncs it."""
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(_format_line(_stamped(step, kind, values)))
    sync(folder / NAME)


def _stamped(step: int, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "kind": kind, "time": utc_now(), **values}


def _format_line(values: dict[str, Any]) -> str:
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields[OF_NOT_FINITE + name] = json.dumps(value)
        elif value is not None:
            fields[name] = value
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line that was read, with its numbers that are not finite, and without nesting.

    Lines of earlier versions held dictionaries, lists and null, and the strings of
    `NOT_FINITE` in place of numbers.
    """
    fields: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            new = NESTED.get(name, name.removesuffix("_by_group"))
            fields |= _flat(group_fields(new, value))
        elif isinstance(value, list):
            fields[name] = ",".join(map(str, value))
        elif isinstance(value, str) and value in NOT_FINITE:
            fields[name.removeprefix(OF_NOT_FINITE)] = NOT_FINITE[value]
        elif value is not None:
            fields[name] = value
    return fields


def parse_line(written: bytes) -> dict[str, Any] | None:
    """One line of a file that may still grow; None where it is no metrics line."""
    try:
        line = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if mismatch(line, LINE):
        return None
    line = _flat(line)
    return None if mismatch(line, _shape) else line


def _shape(line: dict[str, Any]) -> dict[str, Any]:
    """The types that reports and charts expect in a line with these metrics."""
    if line["kind"] not in FIELDS:
        return {}
    words = [name for name in ("metrics", "loss_unit") if name in line]
    names = {"bits_per_byte", *str(line.get("metrics", "")).split(",")}
    numbers = [name for name in line if "/" in name or name in names]
    shape = dict.fromkeys(numbers, NUMBER) | dict.fromkeys(words, str)
    return shape | FIELDS[line["kind"]]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads all lines of a `metrics.jsonl` that are metrics; none without a file.

    Lines of an earlier version have the form of this one. A warning counts the lines
    that are no metrics.

    Raises:
      OSError: the file cannot be read.
      UserError: it is no file.
    """
    lines, bad = read_json_lines(folder / NAME, LINE)
    known = [_flat(line) for line in lines]
    found = [x for x in known if not mismatch(x, _shape)]
    if dropped := len(bad) + len(known) - len(found):
        logging.warning(
            "%s: %d of %d lines are no metrics, and are not shown",
            folder / NAME,
            dropped,
            len(bad) + len(known),
        )
    return found
