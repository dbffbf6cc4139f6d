"""Checks that pages start: one process each, whose findings are files."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.runs.display_files import DOCTOR, read_findings, read_preview
from research.studio.jobs.job_commands import checking
from research.studio.jobs.job_logs import last_error, tail
from research.tasks.findings import Finding
from research.tasks.row_preview import PreviewDocument

KEPT = 40  # checks whose files stay
SHOWN_ROWS = 3
LOG_BYTES = 4000


@dataclasses.dataclass(frozen=True)
class Check:
    """A check as its files tell it.

    Attributes:
      state: `absent`, `running`, `ended` (it has findings) or `failed` (it has none).
      findings: of the doctor.
      rows: the first rows as the model reads them.
      problem: why it has failed.
      began: seconds since 1970.
    """

    state: str = "absent"
    findings: Sequence[Finding] = ()
    rows: Sequence[PreviewDocument] = ()
    problem: str = ""
    began: float = 0.0

    @property
    def is_red(self) -> bool:
        """Whether a training would be refused for what was found."""
        bad = any(not finding.ok for finding in self.findings)
        return self.state == "failed" or bad


class Checks:
    """The checks of a studio. One runs at a time: a new one ends the one before it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def command(self, flags: Sequence[str], *, rows_only: bool) -> list[str]:
        """The command of a check of the trainer's `flags`."""
        return checking(flags, self._place(flags, rows_only), rows_only=rows_only)

    def start(self, flags: Sequence[str], *, rows_only: bool) -> None:
        """Starts a check in a process of its own, on the CPU if it reads rows only."""
        place = self._place(flags, rows_only)
        words = self.command(flags, rows_only=rows_only)
        with self._lock:
            if self._last is not None and self._last.poll() is None:
                self._last.kill()
                self._last.wait()
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            self._forget_old()
            with open(place / "log", "wb") as log:
                self._last = subprocess.Popen(
                    [sys.executable, *words[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | ({"JAX_PLATFORMS": "cpu"} if rows_only else {}),
                )
            born = psutil.Process(self._last.pid).create_time()
            record = {"pid": self._last.pid, "born": born}
            write_whole(place / "process.json", json.dumps(record))

    def read(self, flags: Sequence[str], *, rows_only: bool) -> Check:
        """The check of these flags, as far as it has come."""
        place = self._place(flags, rows_only)
        if not (place / "process.json").is_file():
            return Check()
        record = json.loads((place / "process.json").read_text())
        if self._is_alive(record):
            return Check("running", began=record["born"])
        if not (place / DOCTOR).is_file():
            log = tail(place / "log", LOG_BYTES)
            said = last_error(log) or log.strip() or "it was ended by another check"
            said = said.removeprefix("error: ")
            return Check("failed", problem=said, began=record["born"])
        try:
            findings, rows = read_findings(place), read_preview(place)
        except UserError as error:
            return Check("failed", problem=str(error), began=record["born"])
        documents = [document for row in rows for document in row.documents]
        return Check("ended", findings, documents[:SHOWN_ROWS], began=record["born"])

    def _is_alive(self, record: dict[str, float]) -> bool:
        """Whether the process runs; one that has ended is a zombie until it is read."""
        if self._last is not None and self._last.pid == record["pid"]:
            return self._last.poll() is None
        try:
            process = psutil.Process(int(record["pid"]))
            is_it = process.create_time() == record["born"]
            return is_it and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _place(self, flags: Sequence[str], rows_only: bool) -> Path:
        text = json.dumps([rows_only, *flags])
        return self._folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def _forget_old(self) -> None:
        places = sorted(self._folder.iterdir(), key=lambda p: p.stat().st_mtime)
        for place in places[:-KEPT]:
            shutil.rmtree(place, ignore_errors=True)
