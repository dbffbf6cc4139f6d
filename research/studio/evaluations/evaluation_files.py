"""Evaluations in run directories: a list of all, and the results of one."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.json_files import NUMBER, mismatch, read_json
from research.report import evaluation_page
from research.report.result_tables import Table
from research.runs.display_files import EVALUATIONS
from research.studio.listing.run_index import ListedRun

FILE, ROWS = "evaluation.json", "rows.jsonl"


def _shape_of_model(value: Any) -> dict[str, Any]:
    losses = {"loss": NUMBER, "tokens": int, "by_group": dict}
    has_loss = isinstance(value, dict) and "loss" in value
    return {"run": str} | (losses if has_loss else {})  # Prompts alone have none.


REQUIRED = {
    "step": int | None,
    "data": {"origin": str},
    "baseline": str,
    "differences": [str],
    "left_out": [str],
    "models": {...: _shape_of_model},
}
ANSWER = {"scores": {...: NUMBER | None}}
ROW = {"row": str, "reference": str, "models": {...: ANSWER}}
MOST_KNOWN = 2000  # evaluations whose line in the list stays in memory
# Earlier versions, and evaluations of losses alone, have no such parts.
OPTIONAL = {
    "findings": [str],
    "unused": [str],
    "overlap": {},
    "metrics": {...: {"unit": str, "note": str}},
}
REMEDY = "remove its folder, and run the evaluation again"
# `rows.jsonl` has the row's id first, so other lines are not parsed.
ROW_ID = re.compile(rb'\{"row": "([^"\\]*)"')
BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclasses.dataclass(frozen=True)
class ListedEvaluation:
    """An evaluation in a list.

    Attributes:
      name: its path as addresses have it, see `Roots`.
      run: that of its run.
      changed: seconds since 1970.
      origin: which rows, and how many.
      models: their names.
      said: what was found, a sentence for each comparison.
      problem: why its file cannot be read; empty if it can be.
    """

    name: str
    run: str
    changed: float
    origin: str = ""
    models: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    problem: str = ""


def _shape(value: Any) -> dict[str, Any]:
    known = value if isinstance(value, dict) else {}
    return REQUIRED | {k: shape for k, shape in OPTIONAL.items() if k in known}


class EvaluationIndex:
    """All evaluations of some runs, whoever made them. Used by one thread at a time."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, ListedEvaluation]] = {}

    def newest(
        self, runs: Sequence[ListedRun], most: int
    ) -> tuple[list[ListedEvaluation], int]:
        """The newest evaluations, at most so many, and the number of all."""
        found = sorted(_files(runs), key=lambda each: -each[2].st_mtime)
        shown = []
        for run, file, stat in found[:most]:
            mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            known = self._known.get(file)
            if known is None or known[0] != mark:
                known = self._known[file] = (mark, _list(run, file, stat.st_mtime))
            shown.append(known[1])
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        return shown, len(found)


@dataclasses.dataclass(frozen=True)
class ChangedRow:
    """A row that two models answer differently well.

    Attributes:
      change: from -1 to 1; above 0 the answer got better.
      row: its line of `rows.jsonl`.
      answers: by model what it answered or chose.
      expected: the reference, or the right choice.
    """

    change: float
    row: Mapping[str, Any]
    answers: Mapping[str, str]
    expected: str

    @classmethod
    def of(cls, change: float, row: Mapping[str, Any]) -> "ChangedRow":
        answers = {x: str(evaluation_page.answer_text(row, x)) for x in row["models"]}
        return cls(change, row, answers, str(evaluation_page.expected_text(row)))


@dataclasses.dataclass(frozen=True)
class EvaluationResults:
    """The parts of an evaluation that a page shows.

    Attributes:
      values: the content of `evaluation.json`.
      described: a sentence on the rows, the step and the baseline.
      verdicts: a sentence on each comparison.
      facts: sentences about rows and models.
      answers, losses, categories: tables; empty where nothing was measured.
      changed: `(title, model, rows)`, worst regressions first.
    """

    values: Mapping[str, Any]
    described: str
    verdicts: Sequence[str]
    facts: Sequence[str]
    answers: Table
    losses: Table
    categories: Table
    changed: Sequence[tuple[str, str, Sequence[ChangedRow]]]


def read_results(folder: Path, rows: Path | None) -> EvaluationResults:
    """Reads an evaluation.

    Args:
      folder: has `evaluation.json`.
      rows: its `rows.jsonl`; None where there is none.

    Raises:
      UserError: a file holds something else than an evaluation writes.
    """
    file = folder / FILE
    values = read_json(file, _shape, REMEDY)
    try:
        values = {name: type(shape)() for name, shape in OPTIONAL.items()} | values
        return EvaluationResults(
            values=values,
            described=evaluation_page.described(values),
            verdicts=evaluation_page.verdict_sentences(values),
            facts=evaluation_page.row_facts(values),
            answers=evaluation_page.tabulate_answers(values),
            losses=evaluation_page.tabulate_losses(
                values, evaluation_page.loss_lines(values)
            ),
            categories=evaluation_page.tabulate_categories(values),
            changed=_changed(values, rows),
        )
    except BROKEN as error:
        raise UserError(f"{file} cannot be shown ({error!r}); {REMEDY}") from error


def _changed(
    values: Mapping[str, Any], rows: Path | None
) -> list[tuple[str, str, list[ChangedRow]]]:
    listed = evaluation_page.changed_rows(values) if rows else []
    wanted = {each["row"] for _, _, found in listed for each in found}
    by_id = dict(_rows(rows, wanted)) if rows and wanted else {}
    return [
        (
            title,
            model,
            [
                ChangedRow.of(float(each["change"]), by_id[each["row"]])
                for each in found
                if each["row"] in by_id
            ],
        )
        for title, model, found in listed
    ]


def _rows(file: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows with these ids, read line by line; lines that are no rows are passed."""
    with file.open("rb") as lines:
        for line in lines:
            begin = ROW_ID.match(line)
            if begin and begin[1].decode(errors="replace") not in wanted:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not mismatch(row, ROW) and row["row"] in wanted:
                yield row["row"], row


def _files(
    runs: Sequence[ListedRun],
) -> Iterator[tuple[ListedRun, Path, os.stat_result]]:
    """Run, file and facts of each `evaluation.json`. Links are not followed."""
    for run in runs:
        place = run.folder / EVALUATIONS
        try:
            entries = [] if place.is_symlink() else [*os.scandir(place)]
        except OSError:
            continue
        for entry in entries:
            file = Path(entry.path, FILE)
            if not entry.is_dir(follow_symlinks=False) or file.is_symlink():
                continue
            try:
                yield run, file, file.stat()
            except OSError:
                continue  # Its answers are being made, or it was removed.


def _list(run: ListedRun, file: Path, changed: float) -> ListedEvaluation:
    name = f"{run.name}/{EVALUATIONS}/{file.parent.name}"
    listed = ListedEvaluation(name, run.name, changed)
    try:
        values = read_json(file, _shape, REMEDY)
        said = (*values.get("findings", ()), *evaluation_page.verdict_sentences(values))
        return dataclasses.replace(
            listed,
            origin=values["data"]["origin"],
            models=tuple(values["models"]),
            said=tuple(map(str, said)),
        )
    except (UserError, *BROKEN) as error:
        return dataclasses.replace(listed, problem=str(error))
