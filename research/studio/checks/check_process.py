"""Checks that pages start: one process each, whose findings are files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from research.core.errors import UserError
from research.runs.display_files import DOCTOR, read_findings, read_preview
from research.studio.checks.page_process import PageProcesses
from research.studio.checks.row_survey import RowSurvey, read_survey
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
      survey: of all rows; None where the task has none.
      began: seconds since 1970.
    """

    state: str = "absent"
    findings: Sequence[Finding] = ()
    rows: Sequence[PreviewDocument] = ()
    problem: str = ""
    began: float = 0.0
    survey: RowSurvey | None = None

    @property
    def is_red(self) -> bool:
        """Whether a training would be refused for what was found."""
        bad = any(not finding.ok for finding in self.findings)
        return self.state == "failed" or bad


class Checks:
    """The checks of a studio."""

    def __init__(self, folder: Path):
        self._processes = PageProcesses(folder)

    def command(
        self, flags: Sequence[str], *, rows_only: bool, first: int = 0
    ) -> list[str]:
        """The command of a check of the trainer's `flags`."""
        place = self._place(flags, rows_only, first)
        return checking(flags, place, rows_only=rows_only, first=first)

    def start(self, flags: Sequence[str], *, rows_only: bool, first: int = 0) -> None:
        """Starts a check in a process of its own, on the CPU if it reads rows only.

        `first` is the number of the first row that is read for the page.
        """
        words = self.command(flags, rows_only=rows_only, first=first)
        env = {"JAX_PLATFORMS": "cpu"} if rows_only else {}
        self._processes.start(self._place(flags, rows_only, first), words, env)

    def read(self, flags: Sequence[str], *, rows_only: bool, first: int = 0) -> Check:
        """The check of these flags, as far as it has come."""
        place = self._place(flags, rows_only, first)
        found = self._processes.look(place)
        if found.state != "ended":
            return Check(found.state, began=found.began)
        if not (place / DOCTOR).is_file():
            return Check("failed", problem=found.problem, began=found.began)
        try:
            findings, rows = read_findings(place), read_preview(place)
            survey = read_survey(place)
        except UserError as error:
            return Check("failed", problem=str(error), began=found.began)
        documents = [document for row in rows for document in row.documents]
        shown, began = documents[:SHOWN_ROWS], found.began
        return Check("ended", findings, shown, began=began, survey=survey)

    def _place(self, flags: Sequence[str], rows_only: bool, first: int) -> Path:
        return self._processes.place([rows_only, *flags, *filter(None, [first])])
