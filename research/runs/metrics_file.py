"""`metrics.jsonl` and TensorBoard: one line or point per step and evaluation.

JSON has no number that is not finite. A line holds its name as a string, `"NaN"`,
`"Infinity"` or `"-Infinity"`, as in the JSON form of protocol buffers; `read_metrics`
gives the number back.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from research.core.atomic_files import sync, write_whole
from research.core.json_files import (
    NUMBER,
    mismatch,
    read_json_lines,
    read_to_rewrite,
)
from research.runs.tensorboard_file import TensorBoard
from research.weights import parameter_paths

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
    "eval": {"loss": NUMBER, "by_group": dict, "tokens": dict},
}
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """`metrics.jsonl` (one JSON object per line, each with `step`) and TensorBoard."""

    def __init__(self, folder: Path, first_step: int):
        """Opens both files and drops everything after `first_step`.

        A run that begins at step 0 drops all lines: it evaluates step 0 again. If lines
        cannot be read, a copy of the file is kept.
        """
        self._path = folder / NAME
        known = read_to_rewrite(self._path, LINE)
        kept = [line for line in known if 0 < first_step >= line["step"]]
        write_whole(self._path, "".join(map(_format_line, kept)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = TensorBoard(folder / "tensorboard", first_step)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends `values`: numbers, or dictionaries of numbers one level deep.

        A string is written into the line alone: TensorBoard draws numbers.

        Raises:
          OSError: the line cannot be written, or its file is no longer in the folder.
        """
        self._require_place()
        self._file.write(_format_line({"step": step, "kind": kind, **values}))
        self._file.flush()
        flat = parameter_paths.flatten(values)[0] if values else {}
        numbers = {
            f"{kind}/{name}".replace(".", "/"): value
            for name, value in flat.items()
            if not isinstance(value, str)
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
        file.write(_format_line({"step": step, "kind": kind, **values}))
    sync(folder / NAME)


def _format_line(values: dict[str, Any]) -> str:
    return json.dumps(_named(values), ensure_ascii=False, allow_nan=False) + "\n"


def _named(value: Any) -> Any:
    """`value` with a name of `NOT_FINITE` in place of each such number."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def _numbered(value: Any) -> Any:
    """Undoes `_named`."""
    if isinstance(value, dict):
        return {key: _numbered(each) for key, each in value.items()}
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads all lines of a `metrics.jsonl` that are metrics; none without a file.

    A warning counts the other lines.

    Raises:
      OSError: the file cannot be read.
      UserError: it is no file.
    """
    lines, bad = read_json_lines(folder / NAME, LINE)
    known = [_numbered(line) for line in lines]
    found = [x for x in known if not mismatch(x, FIELDS.get(x["kind"], {}))]
    if dropped := len(bad) + len(known) - len(found):
        logging.warning(
            "%s: %d of %d lines are no metrics, and are not shown",
            folder / NAME,
            dropped,
            len(bad) + len(known),
        )
    return found
