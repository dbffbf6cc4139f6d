"""Checks that pages start: one process each, whose findings are files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from research.core.errors import UserError
from research.runs.display_files import DOCTOR, read_findings, read_preview
from research.studio.checks.page_process import PageProcesses
from research.studio.jobs.job_commands import checking
from research.tasks.findings import Finding
from research.tasks.row_preview import PreviewDocument

SHOWN_ROWS = 3


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
    """The checks of a studio."""

    def __init__(self, folder: Path):
        self._processes = PageProcesses(folder)

    def command(self, flags: Sequence[str], *, rows_only: bool) -> list[str]:
        """The command of a check of the trainer's `flags`."""
        return checking(flags, self._place(flags, rows_only), rows_only=rows_only)

    def start(self, flags: Sequence[str], *, rows_only: bool) -> None:
        """Starts a check in a process of its own, on the CPU if it reads rows only."""
        words = self.command(flags, rows_only=rows_only)
        env = {"JAX_PLATFORMS": "cpu"} if rows_only else {}
        self._processes.start(self._place(flags, rows_only), words, env)

    def read(self, flags: Sequence[str], *, rows_only: bool) -> Check:
        """The check of these flags, as far as it has come."""
        place = self._place(flags, rows_only)
        found = self._processes.look(place)
        if found.state != "ended":
            return Check(found.state, began=found.began)
        if not (place / DOCTOR).is_file():
            return Check("failed", problem=found.problem, began=found.began)
        try:
            findings, rows = read_findings(place), read_preview(place)
        except UserError as error:
            return Check("failed", problem=str(error), began=found.began)
        documents = [document for row in rows for document in row.documents]
        return Check("ended", findings, documents[:SHOWN_ROWS], began=found.began)

    def _place(self, flags: Sequence[str], rows_only: bool) -> Path:
        return self._processes.place([rows_only, *flags])
