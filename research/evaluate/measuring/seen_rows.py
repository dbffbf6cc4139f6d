"""Which rows of an evaluation the runs have seen in training."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.evaluate.measuring.evaluated_models import ModelSet
from research.evaluate.measuring.evaluated_rows import EvaluatedRow
from research.evaluate.training_overlap import EXACT, TrainingOverlap
from research.runs.answering.found_adapters import FoundFolder
from research.runs.phase_timer import PhaseTimer
from research.runs.reopen import FoundRun, find_run
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks.task_registry import find_kind
from research.tokenize.conversation import Record

MOST_LISTED = 100


def find_seen(found: ModelSet, rows: Sequence[EvaluatedRow]) -> dict[str, Any]:
    """The rows that occur among the training rows of each run, as plain values.

    A run that began from another run has seen the rows of that one, too. The training
    rows are read one by one. The data of a base model is not known.
    """
    asked = {row.id: _texts(row.record) for row in rows}
    seen = {}
    for model in found.models:
        if model.step is None:
            continue
        overlap, read, problem = TrainingOverlap(asked), 0, ""
        try:
            for run in _lineage(model.run):
                for place, record in _training(run):
                    overlap.add(place, *_texts(record))
                    read += 1
        except (UserError, OSError) as error:
            problem = str(error)
            logging.warning(
                "%s: whether it has seen the rows is not known: %s", model.name, problem
            )
        listed = overlap.found()
        seen[model.name] = {
            "training_rows": read,
            "problem": problem,
            "exact": sum(each.kind == EXACT for each in listed),
            "words": sum(each.kind != EXACT for each in listed),
            "rows": [dataclasses.asdict(each) for each in listed[:MOST_LISTED]],
        }
    return seen


def describe_change(run: FoundRun, sha256: str) -> str:
    """Says that the data of a run is not that of its training; empty if it is.

    Args:
      run: any.
      sha256: of the data that its config leads to now.
    """
    begun = run.folder.identity()["data"]
    accepted = History(run.folder.history, PhaseTimer()).accepted
    known = accepted.get("data", begun).rpartition(" -> ")[2]
    if known == sha256:
        return ""
    return (
        f"the data of {run.folder} has changed since its training (sha256 "
        f"{known[:12]}, now {sha256[:12]}): these rows are not those "
        "that it held out, and it may have trained some of them"
    )


def _texts(record: Record) -> tuple[str, str]:
    """The text that is asked, and the expected answer."""
    asked = [turn.text for turn in record.turns[:-1] if turn.role != "system"]
    return "\n".join([*asked, record.context]), record.turns[-1].said


def _lineage(run: FoundRun | FoundFolder) -> Iterator[FoundRun]:
    """The run, and the runs that it began from.

    Raises:
      UserError: it is an adapter of PEFT.
    """
    if isinstance(run, FoundFolder):
        raise UserError(
            f"{run.folder} is an adapter of PEFT, which does not say what it was "
            "trained on"
        )
    yield run
    place, _ = split_step(run.config.model.init_from)
    if place and "://" not in place and RunDir(place).is_run:
        yield from _lineage(find_run(place))


def _training(run: FoundRun) -> Iterator[tuple[str, Record]]:
    """The training rows of a run with their places.

    Raises:
      UserError: they are gone, or are no rows.
    """
    read = find_kind(run.config).training_records
    if read is None:
        raise UserError(f"{run.folder} was trained on raw text, which is not compared")
    for record in read(run.config, run.base):
        yield f"{run.folder.path.name}: {record.where}", record
