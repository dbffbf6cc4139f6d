"""The state of a run from its small files: step, losses, how it ended."""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from research.core.errors import ENDS_WELL, UserError
from research.core.json_files import mismatch
from research.runs import metrics_file
from research.runs.run_directory import COMPLETE, RunDir
from research.runs.run_history import read as read_history

State = Literal["running", "queued", "stopped", "failed", "finished", "new"]
STATES: tuple[State, ...] = (
    *("running", "queued", "stopped", "failed", "finished", "new"),
)
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its newest lines
# A job on another machine cannot be seen; it lives if it has written this recently.
SILENT = 600.0  # seconds
LOCKS = Path("/proc/locks")


@dataclasses.dataclass(frozen=True)
class RunState:
    """A run as lists show it.

    Attributes:
      state: see `STATES`.
      cause: why the newest start ended; empty while it runs.
      step: updates made; None before the first start has begun.
      first: the step that the newest start began with.
      steps: the last step of the whole run, which a loss may have ended before the
        planned one; 0 where it is not known.
      loss: of the newest update; None without one.
      held_out: of the newest evaluation; None without one.
      began: ISO 8601, of the first start; empty without one.
      changed: seconds since 1970, of the newest change that was seen.
      problem: why a file of the run cannot be read; empty if all can be.
    """

    state: State
    cause: str
    step: int | None
    first: int
    steps: int
    loss: float | None
    held_out: float | None
    began: str
    changed: float
    problem: str = ""


def read_state(folder: Path, *, is_training: bool) -> RunState:
    """Reads the state of a run; a file that is damaged becomes its `problem`."""
    try:
        starts = read_history(folder / "run.json")["starts"]
        problem = ""
    except UserError as error:
        starts, problem = [], str(error)
    newest = newest_lines(folder)
    last: Mapping[str, Any] = starts[-1] if starts else {}
    train, held = newest.get("train", {}), newest.get("eval", {})
    changed = _changed(folder)
    state = _state(folder, last, changed, is_training=is_training)
    steps = [x["steps"] for x in starts if not mismatch(x.get("steps"), int)]
    if state == "finished" and train:
        steps.append(train["step"])
    return RunState(
        state=state,
        cause="" if state == "running" else str(last.get("cause") or ""),
        step=train.get("step", last.get("step")),
        first=last.get("first") or 0,
        steps=steps[-1] if steps else 0,
        loss=train.get("loss"),
        held_out=held.get("loss"),
        began=str(starts[0].get("began") or "") if starts else "",
        changed=changed,
        problem=problem,
    )


def _state(
    folder: Path, last: Mapping[str, Any], changed: float, *, is_training: bool
) -> State:
    if is_training:
        return "running"
    has_ended = last.get("cause") is not None
    elsewhere = last.get("host") not in (None, socket.gethostname())
    if last and not has_ended and elsewhere and time.time() - changed < SILENT:
        return "running"
    if os.path.lexists(folder / COMPLETE):
        return "finished"
    if not last:
        return "new"
    if not has_ended:
        return "failed"
    return "stopped" if last.get("exit_code") in ENDS_WELL else "failed"


def require_idle(folder: Path) -> None:
    """Raises UserError: a job trains in `folder`, here or on another machine."""
    if read_state(folder, is_training=HeldLocks().holds(folder)).state == "running":
        raise UserError(
            f"{folder} is being trained in, here or on another machine: stop it first; "
            f"a job elsewhere that was killed counts until {SILENT / 60:.0f} minutes "
            "after its newest line"
        )


def newest_lines(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each kind near the end of `metrics.jsonl`."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError), open(folder / metrics_file.NAME, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        for written in file.read(TAIL).split(b"\n"):
            if line := metrics_file.parse_line(written):
                found[line["kind"]] = line
    return found


def _changed(folder: Path) -> float:
    times = [0.0]
    for name in ("config.json", "run.json", metrics_file.NAME, COMPLETE):
        with contextlib.suppress(OSError):
            times.append(os.stat(folder / name).st_mtime)
    return max(times)


class HeldLocks:
    """The locks that processes of this machine hold now.

    The list of the kernel is read and no lock is taken: a trainer that starts at this
    moment would be refused. Where there is no such list, each lock is tried.
    """

    def __init__(self) -> None:
        self._held: set[tuple[int, int, int]] | None = None
        with contextlib.suppress(OSError, ValueError):
            held = set()
            for line in LOCKS.read_text(encoding="ascii").splitlines():
                words = line.split()
                if words[1:2] == ["FLOCK"] and words[3] == "WRITE":
                    major, minor, inode = words[5].split(":")
                    held.add((int(major, 16), int(minor, 16), int(inode)))
            self._held = held

    def holds(self, folder: Path) -> bool:
        """Whether a process trains in `folder`."""
        try:
            found = os.stat(folder / "lock")
        except OSError:
            return False
        if self._held is None:
            with contextlib.suppress(OSError):
                return RunDir(folder).is_training()
            return False
        device = (os.major(found.st_dev), os.minor(found.st_dev))
        return (*device, found.st_ino) in self._held


def read_json_object(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    """A small file of this room's own; empty where it is absent or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {} if mismatch(found, dict(shape)) else found
