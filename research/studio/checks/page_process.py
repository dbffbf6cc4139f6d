"""Processes whose output a page shows: quick questions, and no jobs of the queue.

Each has a folder, named after the question, so that the same question finds the answer
again, in any tab and after a restart of the studio.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from research.core.atomic_files import write_whole
from research.runs.control.job_logs import last_error, tail
from research.studio.listing.run_state import read_json_object

MOST_BYTES = 64_000  # of a text that a page shows
OUTPUT, LOG, RECORD = "output", "log", "process.json"
KEPT = 40  # answers whose files stay
TRACEBACK = "Traceback (most recent call last)"  # of a program that failed
NICE = 5  # How much a process stands back behind a training.


@dataclasses.dataclass(frozen=True)
class PageProcess:
    """A process as its files tell it.

    Attributes:
      state: `absent`, `running` or `ended`.
      began: seconds since 1970.
      output: the end of what it has printed, if it has ended.
      log: the same of its messages.
    """

    state: str = "absent"
    began: float = 0.0
    output: str = ""
    log: str = ""

    @property
    def was_interrupted(self) -> bool:
        """Whether it was ended before it could say why, if it has no results."""
        return not last_error(self.log) and TRACEBACK not in self.log

    @property
    def problem(self) -> str:
        """Why it has no results, if it has none."""
        said = last_error(self.log) or self.log.strip()
        return said.removeprefix("error: ") or "it was ended by another one"


class PageProcesses:
    """The processes of one page. One runs at a time: a new one ends the one before."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def place(self, question: object) -> Path:
        """The folder of a question, which is plain data."""
        text = json.dumps(question)
        return self._folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def start(
        self, place: Path, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        """Starts a command, whose first word is replaced by this interpreter.

        `env` are variables beside those of the studio.
        """
        with self._lock:
            if self._last is not None and self._last.poll() is None:
                self._last.kill()
                self._last.wait()
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            self._forget_old()
            with open(place / OUTPUT, "wb") as output, open(place / LOG, "wb") as log:
                self._last = subprocess.Popen(
                    [sys.executable, *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    env=os.environ | {**(env or {})},
                )
            process = psutil.Process(self._last.pid)
            process.nice(max(NICE, process.nice()))  # Only root may lower it.
            record = {"pid": process.pid, "born": process.create_time()}
            write_whole(place / RECORD, json.dumps(record))

    def look(self, place: Path) -> PageProcess:
        """The process of a folder, as far as it has come."""
        record = read_json_object(place / RECORD, {"pid": int, "born": float})
        if not record:
            return PageProcess()
        if self._is_alive(record):
            return PageProcess("running", record["born"])
        texts = [tail(place / name, MOST_BYTES) for name in (OUTPUT, LOG)]
        return PageProcess("ended", record["born"], *texts)

    def _is_alive(self, record: Mapping[str, float]) -> bool:
        """Whether the process runs; one that has ended is a zombie until it is read."""
        if self._last is not None and self._last.pid == record["pid"]:
            return self._last.poll() is None
        try:
            process = psutil.Process(int(record["pid"]))
            is_it = process.create_time() == record["born"]
            return is_it and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _forget_old(self) -> None:
        places = sorted(self._folder.iterdir(), key=lambda p: p.stat().st_mtime)
        for place in places[:-KEPT]:
            shutil.rmtree(place, ignore_errors=True)
