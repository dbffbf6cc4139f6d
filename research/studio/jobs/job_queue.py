"""The jobs of this machine, one at a time: a file, a lock, and a process beside it.

A job is a command with a name, a log and the folder that it writes into, whatever door
it runs. `jobs.json` holds those that wait, in their order, the one that runs, and the
last that ended. Whoever changes it holds `lock`; two studios with one root share the
queue. The process that works it off (`python -m research.studio.jobs`) is no child that
ends with the studio. It and the job it has started hold `machine` together, so the next
job starts only when both have ended, however they end.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.core.json_files import read_json
from research.runs.control.job_logs import log_of
from research.runs.utc_clock import utc_now

FILE, LOCK, MACHINE = "jobs.json", "lock", "machine"
KEPT = 50  # jobs that have ended and are still listed


def _shape_of_job(value: Any) -> dict[str, Any]:
    # Earlier versions had trainings alone, and named the run.
    is_old = isinstance(value, dict) and "run" in value
    names = ("run",) if is_old else ("name", "place", "log_file")
    return {"id": str, "command": [str], "folder": str, "added": str} | dict.fromkeys(
        names, str
    )


SHAPE = {name: [_shape_of_job] for name in ("waiting", "running", "ended")}
REMEDY = "remove it: jobs that wait are forgotten, and no run is touched"


@dataclasses.dataclass(frozen=True)
class QueuedJob:
    """One job.

    Attributes:
      id: unique.
      command: its argv.
      name: for people.
      place: the folder that it writes into, such as a run directory.
      log_file: of its output; no two jobs that wait or run have the same.
      folder: the working folder of the command; the other paths start there.
      added: ISO 8601, UTC.
      by: who added it.
      pid, born: of the process, and when the system started it (a pid returns).
      began, ended: ISO 8601, empty before.
      log_begin: bytes that its log had before it began.
      exit_code: None until it has ended, or where nobody saw it end.
      said: the last lines of its output, if it has failed.
    """

    id: str
    command: tuple[str, ...]
    name: str
    place: str
    log_file: str
    folder: str
    added: str
    by: str = ""
    pid: int = 0
    born: float = 0.0
    began: str = ""
    ended: str = ""
    log_begin: int = 0
    exit_code: int | None = None
    said: str = ""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "QueuedJob":
        if run := values.get("run"):  # Earlier versions had trainings alone.
            values |= {"name": run, "place": run, "log_file": str(log_of(Path(run)))}
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        return cls(**values | {"command": tuple(values["command"])})

    @property
    def log(self) -> Path:
        """The file of its output."""
        return Path(self.folder, self.log_file)

    @property
    def target(self) -> Path:
        """The folder that it writes into."""
        return Path(self.folder, self.place)

    @property
    def door(self) -> str:
        """The module that its command runs, such as `research.evaluate`."""
        flagged = "-m" in self.command[:-1]
        return self.command[self.command.index("-m") + 1] if flagged else ""

    @property
    def is_alive(self) -> bool:
        """Whether its process runs on this machine."""
        try:
            return (
                bool(self.pid) and psutil.Process(self.pid).create_time() == self.born
            )
        except psutil.Error:
            return False


@dataclasses.dataclass
class Jobs:
    """The content of `jobs.json`: `running` has one at most, `ended` the last first."""

    waiting: list[QueuedJob]
    running: list[QueuedJob]
    ended: list[QueuedJob]

    def state_of(self, folder: Path) -> str:
        """`running` or `waiting` if a job writes into `folder`, else empty."""
        for state, jobs in (("running", self.running), ("waiting", self.waiting)):
            if any(job.target == folder for job in jobs):
                return state
        return ""

    def require_none_in(self, folder: Path) -> None:
        """Raises UserError: a job that runs or waits writes into or below `folder`."""
        for job in (*self.running, *self.waiting):
            if job.target.is_relative_to(folder):
                raise UserError(
                    f"{folder} stays: {job.name} runs or waits; end or remove that job "
                    "on the page Queue first"
                )


class JobQueue:
    """The queue in a folder, which is made when it is first changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._workers: list[subprocess.Popen[bytes]] = []

    def read(self) -> Jobs:
        """The jobs as they are now. Raises UserError: the file is damaged."""
        empty: dict[str, list[Any]] = {name: [] for name in SHAPE}
        found = read_json(self.folder / FILE, SHAPE, REMEDY, absent=empty)
        made = {k: [QueuedJob.from_json(x) for x in found[k]] for k in SHAPE}
        jobs = Jobs(**made)
        # Nobody saw the end of a job whose worker was killed before it.
        lost = [job for job in jobs.running if job.pid and not job.is_alive]
        if lost and not self._is_worked_on():
            jobs.running, jobs.ended = [], [*lost, *jobs.ended]
        return jobs

    @contextlib.contextmanager
    def changing(self) -> Iterator[Jobs]:
        """Gives the jobs to one process at a time, then writes them."""
        with self._locked(LOCK):
            jobs = self.read()
            yield jobs
            jobs.ended = jobs.ended[:KEPT]
            write_whole(self.folder / FILE, json.dumps(dataclasses.asdict(jobs)))

    def add(
        self,
        command: Sequence[str],
        place: Path,
        by: str,
        *,
        name: str = "",
        log: Path | None = None,
    ) -> QueuedJob:
        """Appends a job and sees to it that somebody works the queue off.

        Args:
          command: its argv.
          place: the folder that it writes into.
          by: who adds it.
          name: for people; that of the folder if it is empty.
          log: the file of its output; beside the folder if it is None.

        Raises:
          UserError: a job with this log waits or runs already.
        """
        job = QueuedJob(
            id=uuid.uuid4().hex[:12],
            command=tuple(command),
            name=name or str(place),
            place=str(place),
            log_file=str(log or log_of(place)),
            folder=str(Path.cwd()),
            added=utc_now(),
            by=by,
        )
        with self.changing() as jobs:
            if any(x.log == job.log for x in (*jobs.waiting, *jobs.running)):
                raise UserError(f"a job for {job.name} waits or runs already")
            jobs.waiting.append(job)
        self.work()
        return job

    def remove(self, name: str) -> QueuedJob:
        """Removes a job that waits. Raises UserError: it does not wait."""
        with self.changing() as jobs:
            job = _find(jobs.waiting, name)
            jobs.waiting.remove(job)
        return job

    def move(self, name: str, by: int) -> None:
        """Moves a job that waits by so many places, -1: forward. Raises UserError."""
        with self.changing() as jobs:
            job = _find(jobs.waiting, name)
            place = jobs.waiting.index(job) + by
            jobs.waiting.remove(job)
            jobs.waiting.insert(max(0, place), job)

    def work(self) -> None:
        """Starts the process that works the queue off, if none does and jobs wait."""
        self._workers = [x for x in self._workers if x.poll() is None]
        if not self.read().waiting or self._is_worked_on():
            return
        command = [sys.executable, "-m", "research.studio.jobs"]
        with open(self.folder / "worker.log", "ab") as log:
            process = subprocess.Popen(
                [*command, f"--queue={self.folder.absolute()}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # It outlives the studio and its terminal.
            )
        self._workers.append(process)

    def _is_worked_on(self) -> bool:
        """Whether a worker, or a job whose worker was killed, holds the machine.

        The lock is shared for a moment only; a worker waits for it that long.
        """
        with (
            contextlib.suppress(FileNotFoundError),
            open(self.folder / MACHINE, "rb") as file,
        ):
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[BinaryIO]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _find(jobs: list[QueuedJob], name: str) -> QueuedJob:
    for job in jobs:
        if job.id == name:
            return job
    raise UserError("this job does not wait any more: it has begun or was removed")


def queue_folder(root: Path) -> Path:
    """The folder of this machine's queue, where several machines share the runs."""
    return root / ".studio" / f"queue-{os.uname().nodename}"
