"""The numbers of `metrics.jsonl` as columns, read once and then followed.

A chart of a long run needs a few fields of many lines. A line is read into these fields
alone (`msgspec`), and when the file has grown, only the new bytes are read.
"""

import array
import collections
import dataclasses
import datetime
import math
import operator
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from research.data.grouped_values import by_group
from research.runs import metrics_file

CHUNK = 1 << 18  # bytes that are read at a time: their values stay in a cache
RECENT = 400  # lines from which the pace of a run is taken
# The fields of a `train` line that charts and figures show.
TRAIN = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_gb"),
    *("mfu", "step_s", "tokens", "elapsed_s"),
)
_Value = float | str | None  # Earlier versions wrote "NaN" in place of a number.


class _Line(msgspec.Struct):
    step: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    kind: str
    time: str = ""


_TrainLine = msgspec.defstruct(
    "_TrainLine", [(name, _Value, None) for name in TRAIN], bases=(_Line,), kw_only=True
)
_DECODER = msgspec.json.Decoder(_TrainLine)
_MANY = msgspec.json.Decoder(list[_TrainLine])
_VALUES = operator.attrgetter(*TRAIN)
_NUMBER = re.compile("[0-9]{1,20}")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """How far somebody has read: lines of each kind, of one edition of the file.

    A run that resumes replaces its file; `edition` is then another one. It is stable
    when the studio starts again, so a stream continues where it was.
    """

    edition: int
    train: int
    evals: int

    def __str__(self) -> str:
        return f"{self.edition}-{self.train}-{self.evals}"

    @classmethod
    def parse(cls, text: str) -> "Cursor | None":
        parts = text.split("-")
        if len(parts) != 3 or not all(map(_NUMBER.fullmatch, parts)):
            return None
        return cls(*map(int, parts))


class MetricColumns:
    """The columns of one file; threads may share them.

    Attributes:
      bad: lines that are no metrics.
      problem: why the file cannot be read; empty where it can.
    """

    def __init__(self, folder: Path):
        self._path = folder / metrics_file.NAME
        self._lock = threading.Lock()
        self.problem = ""
        self._clear(0)

    def _clear(self, edition: int) -> None:
        self._edition, self._offset = edition, 0
        self._torn = b""  # The beginning of a line whose end is not written yet.
        self.bad = 0
        self._steps = array.array("q")
        self._times: collections.deque[tuple[int, str]]
        self._times = collections.deque(maxlen=RECENT)
        self._train = {name: array.array("d") for name in TRAIN}
        self._evals: list[dict[str, Any]] = []

    def refresh(self) -> None:
        """Reads what has been written since. Without a file there are no lines."""
        with self._lock:
            self.problem = ""
            try:
                self._read_on()
            except FileNotFoundError:
                self._clear(0)
            except OSError as error:
                self._clear(0)
                self.problem = f"{self._path.name} cannot be read: {error.strerror}"

    def _read_on(self) -> None:
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._edition or found.st_size < self._offset:
                self._clear(found.st_ino)
            file.seek(self._offset)
            while chunk := file.read(CHUNK):
                self._offset += len(chunk)
                *lines, self._torn = (self._torn + chunk).split(b"\n")
                self._add(lines)

    def _add(self, lines: list[bytes]) -> None:
        """Reads all lines at once, or one by one where one of them is damaged."""
        try:
            found = _MANY.decode(b"[" + b",".join(lines) + b"]")
        except _UNREADABLE:
            found = []
        if len(found) != len(lines):
            found = [_decode(line) for line in lines]
        train = []
        for line, written in zip(found, lines, strict=True):
            if line is not None and line.kind == "train":
                train.append(line)
            else:
                self._add_other(written)
        self._steps.extend([line.step for line in train])
        self._times.extend([(line.step, line.time) for line in train[-RECENT:]])
        columns = zip(*map(_VALUES, train), strict=True)
        for column, values in zip(self._train.values(), columns, strict=False):
            column.extend([x if type(x) is float else math.nan for x in values])

    def _add_other(self, written: bytes) -> None:
        line = metrics_file.parse_line(written)
        if line is None or line["kind"] == "train":  # One that is no `_TrainLine`.
            self.bad += 1
        elif line["kind"] == "eval":
            self._evals.append(line)

    def cursor(self) -> Cursor:
        """The end of what has been read."""
        with self._lock:
            return Cursor(self._edition, len(self._steps), len(self._evals))

    def train(self, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Columns `[lines]` of the `train` lines `[start:stop]`, and `step`.

        With a cursor's `stop` they end there, although another thread reads on.
        """
        with self._lock:
            found = {"step": np.array(self._steps[start:stop], dtype=np.int64)}
            for name, column in self._train.items():
                found[name] = np.array(column[start:stop], dtype=np.float64)
            return found

    def pace(self, first: int) -> float | None:
        """Wall seconds for a step in the newest lines behind step `first`, with the
        evaluations and saves between them; None where there are too few.
        """
        with self._lock:
            recent = [(step, time) for step, time in self._times if step > first]
        if len(recent) < 2:
            return None
        (step, begun), (last, ended) = recent[0], recent[-1]
        try:
            begin, end = map(datetime.datetime.fromisoformat, (begun, ended))
            return max(0.0, (end - begin).total_seconds()) / max(1, last - step)
        except (ValueError, TypeError):  # No time, or one without its zone.
            return None

    def evals(self, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
        """The `eval` lines `[start:stop]`."""
        with self._lock:
            return self._evals[start:stop]


def _decode(line: bytes) -> Any:
    try:
        return _DECODER.decode(line)
    except _UNREADABLE:
        return None


def held_out_curves(lines: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Held-out losses as `[steps, losses]`, in all under "" and by group."""
    curves: dict[str, list[list[float]]] = {}
    for line in lines:
        values: Mapping[str, Any] = {"": line["loss"], **by_group(line, "loss")}
        for group, value in values.items():
            steps, losses = curves.setdefault(group, [[], []])
            steps.append(line["step"])
            losses.append(value)
    return curves
