"""The files of a run directory that say in JSON what people look at.

`doctor.json` and `preview.json` are written at each start, `samples.jsonl` during
training, `answers.json` at the end; `docs/run_directory.md` lists their fields.
Whoever shows a run, in a terminal or on a page, reads these and `metrics.jsonl`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.core.atomic_files import write_whole
from research.tasks.findings import Finding
from research.tasks.model_answers import ComparedAnswer, Sample
from research.tasks.row_preview import PreviewRow

DOCTOR, PREVIEW = "doctor.json", "preview.json"
ANSWERS, SAMPLES = "answers.json", "samples.jsonl"


def write_findings(folder: Path, findings: Sequence[Finding]) -> None:
    """Writes `doctor.json`. Raises OSError."""
    ok = all(finding.ok for finding in findings)
    _write(folder / DOCTOR, {"ok": ok, "findings": _plain(findings)})


def read_findings(folder: Path) -> list[Finding]:
    """Reads `doctor.json`; an empty list where there is none."""
    return [Finding.from_json(x) for x in _read(folder / DOCTOR).get("findings", ())]


def write_preview(folder: Path, rows: Sequence[PreviewRow]) -> None:
    """Writes `preview.json`. Raises OSError."""
    _write(folder / PREVIEW, {"rows": _plain(rows)})


def read_preview(folder: Path) -> list[PreviewRow]:
    """Reads `preview.json`; an empty list where there is none."""
    return [PreviewRow.from_json(x) for x in _read(folder / PREVIEW).get("rows", ())]


def write_answers(folder: Path, answers: Sequence[ComparedAnswer]) -> None:
    """Writes `answers.json`. Raises OSError."""
    _write(folder / ANSWERS, {"answers": _plain(answers)})


def read_answers(folder: Path) -> list[ComparedAnswer]:
    """Reads `answers.json`; an empty list where there is none."""
    return [ComparedAnswer(**x) for x in _read(folder / ANSWERS).get("answers", ())]


def add_samples(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """Adds the samples of `step` to `samples.jsonl`.

    Lines of this and later steps go: a resumed run makes these steps again.

    Raises:
      OSError: the file cannot be written.
    """
    kept = [sample for sample in read_samples(folder) if sample.step < step]
    lines = [json.dumps(x, ensure_ascii=False) for x in _plain([*kept, *samples])]
    if lines:
        write_whole(folder / SAMPLES, "".join(f"{line}\n" for line in lines))


def read_samples(folder: Path) -> list[Sample]:
    """Reads `samples.jsonl`; an empty list where there is none."""
    path = folder / SAMPLES
    if not path.is_file():
        return []
    # Not `splitlines`: JSON leaves some of the line ends that it knows unescaped.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Sample(**json.loads(line)) for line in lines if line]


def _plain(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(value) for value in values]


def _write(path: Path, value: dict[str, Any]) -> None:
    # ASCII, because a file's name may hold bytes that no encoding of text can carry.
    write_whole(path, json.dumps(value) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
