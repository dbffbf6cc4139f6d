"""The results of a run, read from its directory: the input of every final report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.report.result_tables import comparable
from research.runs.display_files import read_answers, read_measures, read_samples
from research.runs.metrics_file import read_metrics
from research.tasks.model_answers import AnswerMeasure, ComparedAnswer, Sample

COMPARED = ("base", "tuned", "reference")  # the answers to a held-out prompt


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


def read_results(
    folder: Path,
    facts: Mapping[str, Any],
    wall_time: Sequence[tuple[str, float]],
    settings: Sequence[Sequence[str]] = (),
) -> RunResults:
    """Reads `metrics.jsonl`, `answers.json` and `samples.jsonl` of a run directory."""
    lines = read_metrics(folder)
    return RunResults(
        name=folder.name,
        facts=facts,
        settings=settings,
        train=[line for line in lines if line["kind"] == "train"],
        evaluations=comparable([line for line in lines if line["kind"] == "eval"]),
        wall_time=wall_time,
        answers=read_answers(folder),
        samples=read_samples(folder),
        measures=read_measures(folder),
    )
