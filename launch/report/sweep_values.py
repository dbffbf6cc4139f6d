"""The report of a sweep as plain values: `report.json`, which other pages show."""

import json
import math
from pathlib import Path
from typing import Any

from launch.report import best_run
from launch.report.seed_statistics import PERCENT
from launch.report.sweep_results import PointResult, SweepReport
from research.core.atomic_files import write_whole
from research.report.progress_view import duration

FILE = "report.json"


def as_json(report: SweepReport) -> dict[str, Any]:
    """Everything that the report says in words and numbers."""
    results = [result for row in report.rows for result in row.results]
    best = best_run.find_best(report)
    return {
        "name": report.folder.name,
        "question": report.sweep["question"],
        "metric": report.sweep["metric"],
        "baseline": list(report.baseline),
        "done": sum(result.state == "done" for result in results),
        "count": len(results),
        "best": best
        and {
            "words": best.words,
            "flags": best.flags,
            "run": best.run.name,
            "value": best.run.value,
        },
        "header": header(report),
        "rows": [cells(row) for row in report.rows],
        "runs": [
            {"name": x.name, "point": list(x.point), "state": x.state, "value": x.value}
            for x in results
        ],
        "origins": report.origins,
    }


def write(report: SweepReport) -> Path:
    """Writes `report.json` into the folder of the sweep. Raises OSError."""
    path = report.folder / FILE
    write_whole(path, json.dumps(as_json(report), indent=1) + "\n")
    return path


def header(report: SweepReport) -> list[str]:
    """The names of the table's columns."""
    return [
        *report.axes,
        "seeds",
        f"{report.sweep['metric']}, mean",
        f"{PERCENT} % interval",
        "against the baseline",
        f"{PERCENT} % interval",
        "verdict",
        "time a run",
        "tokens",
        "chip-hours",
    ]


def cells(row: PointResult) -> list[str]:
    """One row of the table, in the order of `header`."""
    found, against = row.found, row.comparison and row.comparison.difference
    return [
        *row.point,
        str(found.count if found else 0),
        f"{found.mean:.4f}" if found else "-",
        _between(found),
        f"{against.mean:+.4f}" if against else "-",
        _between(against, "+"),
        row.verdict,
        duration(row.mean("seconds")) if found else "-",
        f"{row.mean('tokens'):,.0f}" if found else "-",
        f"{row.mean('chip_hours'):.3f}" if found else "-",
    ]


def _between(found: Any, sign: str = "") -> str:
    if found is None or not math.isfinite(found.half):
        return "-"
    return f"{found.low:{sign}.4f} to {found.high:{sign}.4f}"
