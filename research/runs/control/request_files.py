"""Requests to a running job, as files in its run directory.

A request is a JSON file `RUN_DIR/requests/KIND-ID.json`. Anybody may write one: the
command `python -m research.runs`, a page, a script. The job answers it between two
steps (`request_listener.py`): the first process writes the answer into `run.json` and
removes the file. Imports no JAX, so that a command answers at once.
"""

import dataclasses
import getpass
import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any

from research.core import atomic_files
from research.core.errors import UserError, nearest
from research.core.json_files import mismatch, read_json, require_file
from research.runs.utc_clock import utc_now

FOLDER = "requests"
# Each is one thing a step boundary can do.
STOP, CHECKPOINT, SAMPLE = KINDS = ("stop", "checkpoint", "sample")
# The shapes of a request's file, and of what every answer in `run.json` has.
REQUEST = {"kind": str, "id": str, "asked_at": str, "asked_by": str}
ANSWER = {"id": str, "answer": str, "step": int | None}


@dataclasses.dataclass(frozen=True)
class ControlRequest:
    """One request that waits.

    Attributes:
      kind: one of `KINDS`.
      id: unique; its answer in `run.json` carries it.
      asked_at: ISO 8601 time, UTC.
      asked_by: `user@host`.
      path: its file.
    """

    kind: str
    id: str
    asked_at: str
    asked_by: str
    path: Path


def write_request(run: Path, kind: str) -> str:
    """Asks the run in the folder `run` for something; returns the request's id.

    Raises:
      UserError: there is no such kind, or the folder cannot be written.
    """
    if kind not in KINDS:
        raise UserError(
            f"{kind!r} is not a request{nearest(kind, KINDS)}; the requests are "
            f"{', '.join(KINDS)}"
        )
    name = uuid.uuid4().hex[:12]
    asked = {"kind": kind, "id": name, "asked_at": utc_now(), "asked_by": _whoami()}
    path = run / FOLDER / f"{kind}-{name}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        atomic_files.write_whole(path, json.dumps(asked).encode())
    except OSError as error:
        raise UserError(
            f"the request {path} cannot be written: {error}; the trainer reads its "
            "requests there, so make room or give this user the right to write"
        ) from error
    return name


def withdraw(run: Path, name: str) -> bool:
    """Removes a request that has no answer yet; returns whether it was there."""
    matching = [request for request in pending(run) if request.id == name]
    for request in matching:
        request.path.unlink(missing_ok=True)
    return bool(matching)


def pending(run: Path) -> list[ControlRequest]:
    """The requests that wait, the oldest first. Other files are ignored."""
    requests = []
    for path in (run / FOLDER).glob("*-*.json"):
        try:
            require_file(path)
            request = ControlRequest(**read_json(path, REQUEST, ""), path=path)
        except (UserError, TypeError):
            continue
        if request.kind in KINDS:
            requests.append(request)
    return sorted(requests, key=lambda request: (request.asked_at, request.id))


def answer_to(history: Path, name: str) -> dict[str, Any] | None:
    """The answer to the request `name` in the `run.json` at `history`, or None so far.

    An answer has the fields of the request and `answered_at`, `answer` (in words), and
    `step`: the number of updates after which it was done, None if it was dropped.
    """
    try:
        answers = read_json(history, {"requests": list}, "")["requests"]
    except UserError:  # The job may write it right.
        return None
    known = (answer for answer in answers if not mismatch(answer, ANSWER))
    return next((answer for answer in known if answer["id"] == name), None)


def _whoami() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # A user without a name, as in some containers.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
