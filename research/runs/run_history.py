"""`run.json`: every start of a run and how it ended, and what happened to it."""

import dataclasses
import datetime
import json
import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

import jax

from research.core.errors import UserError
from research.runs import provenance
from research.runs.wall_time import NAMES, Phases

UNKNOWN = "ended without a word: killed, or the machine went down"


class History:
    """What is known of a run beyond its metrics; the first process writes it.

    Attributes:
      saved: the last step that was on disk for good, 0 if none ever was.
      skipped: numbers of batches that are left out, see `feed.Feed`.
      accepted: `old -> new` by name of what the user let differ.
    """

    def __init__(self, path: Path, phases: Phases):
        """Reads what there is.

        Raises:
          UserError: the file is not one of ours.
        """
        self._path = path
        self._phases = phases
        self._found = read(path)
        self._begun = False

    @property
    def saved(self) -> int:
        return self._found["saved"]

    @property
    def skipped(self) -> list[int]:
        return self._found["skipped_batches"]

    @property
    def accepted(self) -> dict[str, str]:
        return self._found["accepted"]

    def accept(self, differences: dict[str, str]) -> None:
        """What differs from the run's beginning, `old -> new` by name, at a wish."""
        for name, change in differences.items():
            self.accepted[name] = change
            self.event(f"accepted: {name}: {change}")

    def begin(self) -> None:
        """This process has the run to itself; called again, nothing happens."""
        if self._begun:
            return
        starts = self._found["starts"]
        if starts and starts[-1]["cause"] is None:
            starts[-1]["cause"] = UNKNOWN
        devices = jax.devices()
        starts.append(
            {
                "began": _now(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "processes": jax.process_count(),
                "devices": f"{len(devices)} {devices[0].device_kind}",
                "provenance": provenance.describe(),
                "first": None,  # Unless it comes as far as its first step.
                "step": None,
                "redone": 0,
                "seconds": self._phases.seconds,
                "ended": None,
                "cause": None,
                "exit_code": None,
            }
        )
        self._begun = True
        self._write()

    def go_on(self, first: int) -> None:
        """From step `first`; again, after a rollback."""
        start = self._found["starts"][-1]
        if start["first"] is None:
            start["first"] = first
        else:
            start["redone"] += start["step"] - first
        start["step"] = first
        self._write()

    def note(self, step: int) -> None:
        """Updates done so far."""
        if self._begun:
            self._found["starts"][-1] |= {
                "step": step,
                "seconds": self._phases.seconds,
            }
            self._write()

    def commit(self, step: int) -> None:
        """A checkpoint of `step` is on disk for good."""
        self._found["saved"] = step
        self._write()

    def event(self, what: str) -> None:
        """Something a person should find again."""
        self._found["events"].append({"at": _now(), "what": what})
        self._write()

    def skip(self, batch: int) -> None:
        """From now on `batch` is left out."""
        self.skipped.append(batch)
        self._write(required=True)

    def end(self, cause: str, exit_code: int) -> None:
        """Of this start; the first cause that is given counts."""
        if self._begun and self._found["starts"][-1]["cause"] is None:
            self._found["starts"][-1] |= {
                "ended": _now(),
                "seconds": self._phases.seconds,
                "cause": cause,
                "exit_code": exit_code,
            }
            self._write()

    def goodput(self) -> "Goodput":
        """Over all starts."""
        return goodput(self._found["starts"])

    def _write(self, *, required: bool = False) -> None:
        # Before `begin` there may be no folder, and never one without a run.
        if jax.process_index() > 0 or not self._path.parent.is_dir():
            return
        temporary = self._path.with_suffix(".tmp")
        text = json.dumps(self._found, indent=1, ensure_ascii=False)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            if required:
                raise
            # A run is worth more than its history: a checkpoint may still fit.
            logging.error("%s could not be written: %s", self._path, error)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(path: Path) -> dict[str, Any]:
    """The file's content, or that of a run that has not begun.

    Raises:
      UserError: the file is not one of ours.
    """
    empty = {
        "starts": [],
        "events": [],
        "saved": 0,
        "skipped_batches": [],
        "accepted": {},
    }
    if not path.is_file():
        return empty
    try:
        found = json.loads(path.read_bytes())
        if not all(type(found[key]) is type(empty[key]) for key in empty):
            raise ValueError("fields of other types")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the history of a run ({error}); bring a copy back: it "
            "says which batches were left out and what was accepted. Removed, the "
            "run goes on without"
        ) from error
    return found


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where a run's wall time went, in seconds; what it stood still is not counted.

    Attributes:
      total: lived by all of its starts.
      by_phase: `step` holds only steps that were kept, `restart` every start but the
        first and all steps that had to be done again.
    """

    total: float
    by_phase: dict[str, float]

    @property
    def share(self) -> float:
        """Of the wall time, in steps that were kept."""
        return self.by_phase["step"] / self.total if self.total else 0.0

    @property
    def parts(self) -> list[tuple[str, float]]:
        """Phases and their seconds, the longest first; without what is next to none."""
        known = [x for x in self.by_phase.items() if x[1] >= 1e-4 * self.total > 0]
        return sorted(known, key=lambda part: -part[1])

    def line(self) -> dict[str, Any]:
        """As `metrics.jsonl` has it."""
        seconds = {name: round(s, 3) for name, s in self.by_phase.items()}
        return {"goodput": self.share, "total_s": self.total, "seconds": seconds}

    def __str__(self) -> str:
        if not self.total:
            return "nothing yet"
        shown = [f"{name} {s / self.total:.1%}" for name, s in self.parts]
        return f"{self.share:.1%} of {self.total:,.0f} s: {', '.join(shown)}"


def goodput(starts: list[dict[str, Any]]) -> Goodput:
    """Of the `starts` of a `run.json`."""
    by_phase = dict.fromkeys((*NAMES, "restart"), 0.0)
    lowest = math.inf  # Where a later start went on from: what lies above was lost.
    for index, start in reversed(list(enumerate(starts))):
        spent = dict(start["seconds"])
        if index:
            by_phase["restart"] += spent.pop("start")
        if start["first"] is not None:
            made = start["step"] - start["first"] + start["redone"]
            redone = min(start["redone"] + max(start["step"] - lowest, 0), made)
            lost = spent["step"] * redone / made if made else 0.0
            spent["step"] -= lost
            by_phase["restart"] += lost
            lowest = min(lowest, start["first"])
        for name, seconds in spent.items():
            by_phase[name] += seconds
    return Goodput(sum(by_phase.values()), by_phase)
