"""`metrics.jsonl` and TensorBoard: one line or point per step and evaluation."""

import json
import os
from pathlib import Path
from typing import Any

from research.core.atomic_files import write_whole
from research.core.json_files import read_json_lines, read_to_rewrite
from research.weights import parameter_paths

NAME = "metrics.jsonl"
LINE = {"step": int, "kind": str}


class MetricsFile:
    """`metrics.jsonl` (one JSON object per line, each with `step`) and TensorBoard."""

    def __init__(self, folder: Path, first_step: int):
        """Opens both files and drops everything after `first_step`.

        A run that begins at step 0 drops all lines: it evaluates step 0 again. If lines
        cannot be read, a copy of the file is kept.
        """
        from tensorboardX import SummaryWriter

        self._path = folder / NAME
        known = read_to_rewrite(self._path, LINE)
        kept = [line for line in known if 0 < first_step >= line["step"]]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else 0
        )

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends `values`: numbers, or dictionaries of numbers one level deep.

        A string is written into the line alone: TensorBoard draws numbers.
        """
        line = {"step": step, "kind": kind, **values}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        flat = parameter_paths.flatten(values)[0] if values else {}
        for name, value in flat.items():
            if not isinstance(value, str):
                tag = f"{kind}/{name}".replace(".", "/")
                self._board.add_scalar(tag, value, step)

    def sync(self) -> None:
        """Waits until all lines would survive a power loss."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes the lines that are still buffered. Raises OSError if it cannot."""
        self._file.close()
        self._board.close()


def append_line(folder: Path, step: int, kind: str, values: dict[str, Any]) -> None:
    """Appends to a `metrics.jsonl` that no run has open."""
    line = json.dumps({"step": step, "kind": kind, **values}, ensure_ascii=False)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads all lines of a `metrics.jsonl` that are metrics; none without a file."""
    return read_json_lines(folder / NAME, LINE)[0]
