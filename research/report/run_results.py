"""The results of a run, read from its directory: the input of every final report."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from research.core.errors import ENDS_WELL, UserError
from research.report.result_tables import comparable
from research.runs import run_history
from research.runs.control.job_logs import last_error, log_of, tail
from research.runs.display_files import (
    read_answers,
    read_findings,
    read_measures,
    read_samples,
)
from research.runs.metrics_file import read_metrics
from research.tasks.findings import Finding
from research.tasks.model_answers import AnswerMeasure, ComparedAnswer, Sample

COMPARED = ("base", "tuned", "reference")  # the answers to a held-out prompt
LOG_BYTES = 24_000
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunResults:
    """Everything that the report of a run shows.

    Attributes:
      facts: what the run is and what it took, one value a name.
      settings: the knobs that differ from the defaults; a header, and a row for each.
      train: the lines of kind `train` in `metrics.jsonl`, one a step.
      evaluations: the lines of kind `eval`, in the order of their steps; of the data
        that the run has now.
      wall_time: seconds by phase, the longest first.
      answers: held-out prompts, answered by both models.
      measures: metrics of the answers to held-out rows, of both models.
      samples: continuations that were written during training.
      findings: of the doctor.
      starts: those of `run.json`, the newest last.
      log: the end of what its jobs have written; empty where that went to a terminal.
      problems: what people must know first: why its newest start has failed, with a
        remedy, and files that are damaged.
    """

    name: str
    facts: Mapping[str, Any]
    settings: Sequence[Sequence[str]]
    train: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    wall_time: Sequence[tuple[str, float]]
    answers: Sequence[ComparedAnswer]
    samples: Sequence[Sample]
    measures: Sequence[AnswerMeasure] = ()
    findings: Sequence[Finding] = ()
    starts: Sequence[Mapping[str, Any]] = ()
    log: str = ""
    problems: Sequence[str] = ()


def read_results(
    folder: Path,
    facts: Mapping[str, Any],
    wall_time: Sequence[tuple[str, float]],
    settings: Sequence[Sequence[str]] = (),
    lines: Sequence[Mapping[str, Any]] | None = None,
) -> RunResults:
    """Reads the files of a run directory, and the log beside it.

    A damaged file is named among the `problems`. `lines` are those of `metrics.jsonl`,
    if the caller has read it.
    """
    lines = read_metrics(folder) if lines is None else lines
    problems: list[str] = []

    def readable(read: Callable[[], T], absent: T) -> T:
        try:
            return read()
        except UserError as error:
            problems.append(str(error))
            return absent

    starts = readable(lambda: run_history.read(folder / "run.json")["starts"], [])
    log = tail(log_of(folder), LOG_BYTES)
    if starts and starts[-1].get("exit_code") not in (None, *ENDS_WELL):
        problems.append(last_error(log) or str(starts[-1]["cause"]))
    return RunResults(
        name=folder.name,
        facts=facts,
        settings=settings,
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=comparable([line for line in lines if line["kind"] == "eval"]),
        wall_time=wall_time,
        answers=readable(lambda: read_answers(folder), []),
        samples=read_samples(folder),
        measures=readable(lambda: read_measures(folder), []),
        findings=readable(lambda: read_findings(folder), []),
        starts=starts,
        log=log,
        problems=[*dict.fromkeys(problems)],
    )
