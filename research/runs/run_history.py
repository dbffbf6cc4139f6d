"""`run.json`: every start of a run, how it ended, and the events in between."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from research.core.atomic_files import write_whole
from research.core.json_files import NUMBER, read_json
from research.data.grouped_values import group_fields
from research.runs import provenance
from research.runs.control.request_files import ANSWER
from research.runs.phase_timer import PHASES, PhaseTimer
from research.runs.utc_clock import utc_now

# Knobs that decide which rows are held out and which of their tokens count.
CHOOSES_ROWS = re.compile(
    r"seed|(data|text)\.(?!path|eval_path|batch_size|microbatch_size|cache|sources)"
)
ACCEPTED = "accepted: "  # The beginning of such an event.
UNKNOWN = "ended without a word: killed, or the machine went down"


def _shape_of_start(start: Any) -> dict[str, Any]:
    """A start whose first step is known has a last step, too."""
    has_begun = isinstance(start, dict) and start.get("first") is not None
    return {
        "first": int | None,
        "step": int if has_begun else int | None,
        "redone": int,
        "seconds": {"start": NUMBER, "step": NUMBER, ...: NUMBER},
        "cause": str | None,
    }


def _shape(found: Any) -> dict[str, Any]:
    """Runs of earlier programs have no `requests`."""
    answered = isinstance(found, dict) and "requests" in found
    return {
        "starts": [_shape_of_start],
        "events": list,
        "saved": int,
        "skipped_batches": [int],
        "accepted": dict,
    } | ({"requests": [ANSWER]} if answered else {})


class History:
    """The record of a run in `run.json`. Only the first process writes it."""

    def __init__(self, path: Path, phases: PhaseTimer):
        """Reads the file if it exists.

        Raises:
          UserError: the file is not a run history.
        """
        self._path = path
        self._phases = phases
        self._found = read(path)
        self._begun = False
        # The watchdog records an end from a thread of its own. A newer record must not
        # be replaced by an older one, nor change while it is turned into text.
        self._lock = threading.RLock()
        self._place: tuple[int, int] | None = None  # The folder at the start.

    @property
    def saved(self) -> int:
        """The last step whose checkpoint was committed; 0 if none was."""
        return self._found["saved"]

    @property
    def skipped(self) -> list[int]:
        """The numbers of the batches that training drops."""
        return self._found["skipped_batches"]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The record of each start, this one last."""
        return self._found["starts"]

    @property
    def accepted(self) -> dict[str, str]:
        """The differences that the user accepted, as `old -> new` by name."""
        return self._found["accepted"]

    def measured_on(self, data: str, more: Mapping[str, str]) -> str:
        """A mark of the rows on which held-out losses are measured.

        It is the sha256 `data` of the rows, unless other accepted differences choose
        other held-out rows among them, or cut them in another way.

        Args:
          data: of the identity.
          more: differences that will be accepted in a moment.
        """
        changes = {**self.accepted, **more}
        chosen = {k: v for k, v in changes.items() if CHOOSES_ROWS.match(k)}
        if not chosen:
            return data
        text = json.dumps([data, chosen], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def accepted_by_step(self) -> dict[int, list[str]]:
        """Lines `name: old -> new` of what was accepted, by the updates made before.

        Those of older versions have no step and are missing.
        """
        found: dict[int, list[str]] = {}
        for event in self._found["events"]:
            if "accepted_after" in event:
                line = event["what"].removeprefix(ACCEPTED)
                found.setdefault(event["accepted_after"], []).append(line)
        return found

    def accept(
        self,
        differences: Mapping[str, str],
        step: int,
        follows: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Records `differences` to the start of the run, `old -> new` by name.

        Args:
          differences: of data and knobs.
          step: the updates that are made.
          follows: changes of other numbers that follow from them, in the same form.
        """
        for name, change in differences.items():
            with self._changing() as found:
                found["accepted"][name] = change
        for name, change in {**differences, **follows}.items():
            self.event(f"{ACCEPTED}{name}: {change}", accepted_after=step)

    def begin(self) -> None:
        """Adds this start of the run, once. The caller holds the lock."""
        if self._begun:
            return
        import jax  # Late, because pages read histories without it.

        devices = jax.devices()
        start = {
            "began": utc_now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": jax.process_count(),
            "devices": f"{len(devices)} {devices[0].device_kind}",
            "provenance": provenance.describe(),
            "first": None,  # Until its first step is known.
            "step": None,
            "redone": 0,
            "seconds": self._phases.seconds,
            "ended": None,
            "cause": None,
            "exit_code": None,
        }
        with self._changing() as found:
            if found["starts"] and found["starts"][-1]["cause"] is None:
                found["starts"][-1]["cause"] = UNKNOWN
            found["starts"].append(start)
            self._begun = True
            self._place = _identity(self._path.parent)

    @property
    def planned_steps(self) -> int:
        """The last step of the whole run, as the newest start planned it; 0 if none."""
        known = [x["steps"] for x in self.starts if "steps" in x]
        return known[-1] if known else 0

    def plan(self, steps: int) -> None:
        """Records the last step of the whole run, which follows from the data where
        the config gives epochs.
        """
        with self._changing() as found:
            found["starts"][-1]["steps"] = steps

    def resume_from(self, first: int) -> None:
        """Records that training starts at step `first`, also after a rollback."""
        with self._changing() as found:
            start = found["starts"][-1]
            if start["first"] is None:
                start["first"] = first
            else:
                start["redone"] += start["step"] - first
            start["step"] = first

    def note(self, step: int) -> None:
        """Records `step`, the updates that are done."""
        if self._begun:
            with self._changing() as found:
                found["starts"][-1] |= {"step": step, "seconds": self._phases.seconds}

    def commit(self, step: int) -> None:
        """Records that the checkpoint of `step` is committed."""
        with self._changing() as found:
            found["saved"] = step

    def event(self, what: str, **facts: Any) -> None:
        """Records an event for people to find later; `facts` are for programs."""
        with self._changing() as found:
            found["events"].append({"at": utc_now(), "what": what, **facts})

    def answer_request(self, answer: dict[str, Any]) -> None:
        """Keeps the answer to a request, see `request_files`."""
        with self._changing() as found:
            found.setdefault("requests", []).append(answer)

    def skip(self, batch: int) -> None:
        """Records that training drops batch `batch` from now on."""
        with self._changing(required=True) as found:
            found["skipped_batches"].append(batch)

    def end(self, cause: str, exit_code: int) -> None:
        """Records how this start ended; a second call changes nothing."""
        with self._changing() as found:
            if self._begun and found["starts"][-1]["cause"] is None:
                found["starts"][-1] |= {
                    "ended": utc_now(),
                    "seconds": self._phases.seconds,
                    "cause": cause,
                    "exit_code": exit_code,
                }

    def goodput(self) -> "Goodput":
        """The goodput over all starts."""
        return goodput(self._found["starts"])

    @contextlib.contextmanager
    def _changing(self, *, required: bool = False) -> Iterator[dict[str, Any]]:
        """Gives the record to one thread at a time, then writes it."""
        with self._lock:
            yield self._found
            self._write(required=required)

    def _write(self, *, required: bool) -> None:
        import jax

        # Before `begin` there may be no folder, and this must not make one. Later the
        # folder may have been moved, and another run may have its place.
        here = _identity(self._path.parent)
        if jax.process_index() > 0 or not here or (self._begun and here != self._place):
            return
        try:
            # ASCII: a path in a message may hold bytes that are no text.
            write_whole(self._path, json.dumps(self._found, indent=1))
        except OSError as error:
            if required:
                raise
            # The run matters more than its history: a checkpoint may still fit.
            logging.error("%s could not be written: %s", self._path, error)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; None where there is none."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read(path: Path) -> dict[str, Any]:
    """Reads a `run.json`; without a file, the history of a run that has not begun.

    Raises:
      UserError: the file is not a run history.
    """
    return read_json(
        path,
        _shape,
        "restore a copy: it says which batches were dropped and which differences were "
        "accepted. If you remove it, the run resumes without them",
        absent={
            "starts": [],
            "events": [],
            "saved": 0,
            "skipped_batches": [],
            "accepted": {},
        },
    )


def add_event(folder: Path, what: str, **facts: Any) -> bool:
    """Adds an event to the `run.json` of a run, once, unless a process trains it.

    Returns:
      Whether it is there: the process that trains a run would write over it.
    """
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        event, known = {"what": what, **facts}, read(folder / "run.json")["events"]
        if not any(event.items() <= each.items() for each in known):
            History(folder / "run.json", PhaseTimer()).event(what, **facts)
    return True


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The wall time of a run by phase, in seconds. Time between starts is not counted.

    Attributes:
      total: sum over all starts.
      by_phase: `step` holds only steps that were kept. `restart` holds all starts but
        the first, and all steps that were done again.
    """

    total: float
    by_phase: dict[str, float]

    @property
    def share(self) -> float:
        """The fraction of the wall time that was spent in steps that were kept."""
        return self.by_phase["step"] / self.total if self.total else 0.0

    @property
    def parts(self) -> list[tuple[str, float]]:
        """Phases and their seconds, longest first, without those below 0.01 %."""
        known = [x for x in self.by_phase.items() if x[1] >= 1e-4 * self.total > 0]
        return sorted(known, key=lambda part: -part[1])

    def line(self) -> dict[str, Any]:
        """The values of the `goodput` line in `metrics.jsonl`."""
        seconds = {name: round(s, 3) for name, s in self.by_phase.items()}
        line = {"goodput": self.share, "total_s": self.total}
        return line | group_fields("seconds", seconds)

    def __str__(self) -> str:
        if not self.total:
            return "nothing yet"
        shown = [f"{name} {s / self.total:.1%}" for name, s in self.parts]
        return f"{self.share:.1%} of {self.total:,.0f} s: {', '.join(shown)}"


def goodput(starts: list[dict[str, Any]]) -> Goodput:
    """Computes the goodput from the `starts` of a `run.json`."""
    by_phase = dict.fromkeys((*PHASES, "restart"), 0.0)
    lowest = math.inf  # Where later starts resumed: steps above it were lost.
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
            by_phase[name] = by_phase.get(name, 0.0) + seconds
    return Goodput(sum(by_phase.values()), by_phase)
