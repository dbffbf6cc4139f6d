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
INTERRUPTED = "its process was ended by another check, or from outside: check again"


@dataclasses.dataclass(frozen=True)
class Check:
    """A check as its files tell it.

    Attributes:
      state: `absent`, `running`, `ended` (it has findings), `failed` (it has none) or
        `interrupted` (something ended it, so nothing is known).
      findings: of the doctor.
      rows: the first rows as the model reads them.
      problem: why it has no findings.
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
        return bool(self.refusal)

    @property
    def refusal(self) -> str:
        """Why a training would be refused; empty if nothing is known against it."""
        if any(not finding.ok for finding in self.findings):
            return (
                "the doctor forbids this start: do what its findings say, or check "
                "again if the files have changed"
            )
        if self.state == "failed":
            return f"the check of this start failed: {self.problem}"
        return ""


class Checks:
    """The checks of a studio. One of rows, and one of a start, run at a time."""

    def __init__(self, folder: Path):
        self._rows, self._starts = (
            PageProcesses(folder / kind) for kind in ("rows", "starts")
        )

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
        place = self._place(flags, rows_only, first)
        self._of_kind(rows_only).start(place, words, env)

    def read(self, flags: Sequence[str], *, rows_only: bool, first: int = 0) -> Check:
        """The check of these flags, as far as it has come."""
        place = self._place(flags, rows_only, first)
        found = self._of_kind(rows_only).look(place)
        if found.state != "ended":
            return Check(found.state, began=found.began)
        if not (place / DOCTOR).is_file():
            if found.was_interrupted:
                return Check("interrupted", problem=INTERRUPTED, began=found.began)
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
        question = [rows_only, *flags, *filter(None, [first])]
        return self._of_kind(rows_only).place(question)

    def _of_kind(self, rows_only: bool) -> PageProcesses:
        return self._rows if rows_only else self._starts
