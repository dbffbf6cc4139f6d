"""The files of a run directory that say in JSON what people look at.

`doctor.json` and `preview.json` are written at each start, `samples.jsonl` during
training, `answers.json` at the end, and `evaluations/` by `research.evaluate`;
`docs/run_directory.md` lists their fields.
Whoever shows a run, in a terminal or on a page, reads these and `metrics.jsonl`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.atomic_files import make_folder, write_whole
from research.core.json_files import read_json, read_json_lines, read_to_rewrite
from research.tasks.findings import SYSTEM, Finding
from research.tasks.model_answers import AnswerMeasure, ComparedAnswer, Sample
from research.tasks.row_preview import PreviewRow

DOCTOR, PREVIEW = "doctor.json", "preview.json"
ANSWERS, SAMPLES = "answers.json", "samples.jsonl"
EVALUATIONS = "evaluations"
SPAN = {"ids": [int], "text": str, "trained": bool}
METRIC = {"name": str, "unit": str, "rows": int, "verdict": str}


def _shape_of_answers(value: Any) -> dict[str, Any]:
    answers = {f.name: str for f in dataclasses.fields(ComparedAnswer)}
    # Runs of earlier versions measured no metrics.
    measured = isinstance(value, dict) and "metrics" in value
    return {"answers": [answers]} | ({"metrics": [METRIC]} if measured else {})


SHAPES = {
    DOCTOR: {"findings": [{"name": str, "text": str}]},
    PREVIEW: {"rows": [{"documents": [{"group": str, "where": str, "spans": [SPAN]}]}]},
    ANSWERS: _shape_of_answers,
    SAMPLES: {"step": int, "prompt": str, "text": str},
}


def write_findings(folder: Path, findings: Sequence[Finding]) -> None:
    """Writes `doctor.json`. Raises OSError."""
    ok = all(finding.ok for finding in findings)
    _write(folder / DOCTOR, {"ok": ok, "findings": _plain(findings)})


def read_findings(folder: Path) -> list[Finding]:
    """Reads `doctor.json`; an empty list where there is none. Raises UserError."""
    return [Finding.from_json(x) for x in _read(folder, DOCTOR).get("findings", ())]


def read_system(folder: Path, own: str) -> str:
    """The system text that all rows of a run had: `own` of its config, or theirs."""
    found = {x.name: x.text for x in read_findings(folder)}
    return own or found.get(SYSTEM, "")


def write_preview(folder: Path, rows: Sequence[PreviewRow]) -> None:
    """Writes `preview.json`. Raises OSError."""
    _write(folder / PREVIEW, {"rows": _plain(rows)})


def read_preview(folder: Path) -> list[PreviewRow]:
    """Reads `preview.json`; an empty list where there is none. Raises UserError."""
    return [PreviewRow.from_json(x) for x in _read(folder, PREVIEW).get("rows", ())]


def write_answers(
    folder: Path,
    answers: Sequence[ComparedAnswer],
    measures: Sequence[AnswerMeasure] = (),
    not_asked: Sequence[str] = (),
) -> None:
    """Writes `answers.json`. Raises OSError."""
    values = {"answers": _plain(answers), "metrics": _plain(measures)}
    _write(folder / ANSWERS, values | {"not_asked": list(not_asked)})


def read_answers(folder: Path) -> list[ComparedAnswer]:
    """Reads `answers.json`; an empty list where there is none. Raises UserError."""
    return [ComparedAnswer(**x) for x in _read(folder, ANSWERS).get("answers", ())]


def read_measures(folder: Path) -> list[AnswerMeasure]:
    """Reads the metrics in `answers.json`; earlier versions have none there.

    Raises:
      UserError: the file cannot be read.
    """
    return [AnswerMeasure(**x) for x in _read(folder, ANSWERS).get("metrics", ())]


def add_samples(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """Adds the samples of `step` to `samples.jsonl`.

    Lines of this and later steps go: a resumed run makes these steps again.

    Raises:
      OSError: the file cannot be written.
    """
    known = read_to_rewrite(folder / SAMPLES, SHAPES[SAMPLES])
    kept = [line for line in known if line["step"] < step]
    lines = [json.dumps(x, ensure_ascii=False) for x in (*kept, *_plain(samples))]
    if lines:
        write_whole(folder / SAMPLES, "".join(f"{line}\n" for line in lines))


def read_samples(folder: Path) -> list[Sample]:
    """Reads the lines of `samples.jsonl` that are samples; none without a file."""
    lines, _ = read_json_lines(folder / SAMPLES, SHAPES[SAMPLES])
    return [Sample(line["step"], line["prompt"], line["text"]) for line in lines]


def write_evaluation(
    folder: Path,
    name: str,
    values: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    pages: Mapping[str, str],
) -> Path:
    """Writes a folder of `evaluations/`, and returns its path. Raises OSError.

    Args:
      folder: of the run.
      name: of the evaluation.
      values: the content of its `evaluation.json`, which is written last.
      rows: the lines of its `rows.jsonl`; without any there is no such file.
      pages: texts for people, by the name of the file.
    """
    place = folder / EVALUATIONS / name
    make_folder(place)
    if rows:
        write_whole(place / "rows.jsonl", "".join(json.dumps(x) + "\n" for x in rows))
    for page, text in pages.items():
        write_whole(place / page, text)
    write_whole(place / "evaluation.json", json.dumps(values, indent=1) + "\n")
    return place


def _plain(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(value) for value in values]


def _write(path: Path, value: dict[str, Any]) -> None:
    # ASCII, because a file's name may hold bytes that no encoding of text can carry.
    write_whole(path, json.dumps(value) + "\n")


def _read(folder: Path, name: str) -> dict[str, Any]:
    remedy = "remove it: the next start of the run writes it anew"
    return read_json(folder / name, SHAPES[name], remedy, absent={})
