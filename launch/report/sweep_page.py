"""Writes a sweep's report: `report.html`, a single file, and `report.md`."""

import math
import shlex
from pathlib import Path
from typing import Any

import jinja2.sandbox

from launch.report import seed_statistics, sweep_plots, sweep_results
from launch.report.sweep_results import PointResult, SweepReport
from research.core.visible_text import visible
from research.report.markdown_report import escaped
from research.report.progress_view import duration

TEMPLATES = Path(__file__).parent / "templates"


def write(folder: Path) -> list[Path]:
    """Reads the sweep in `folder` and writes both pages and the plots.

    Raises:
      UserError: there is no sweep, or its runs do not measure its metric.
    """
    report = sweep_results.load(folder)
    pictures = {"curves": sweep_plots.curves(report)}
    for index in range(len(report.axes)):
        pictures[f"axis-{index + 1}"] = sweep_plots.along(report, index)
    for name, svg in pictures.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    written = []
    for name in ("report.html", "report.md"):
        path = folder / name
        path.write_text(_render(name, report, pictures), encoding="utf-8")
        written.append(path)
    return written


def _render(name: str, report: SweepReport, pictures: dict[str, str]) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["literal"] = escaped
    file = TEMPLATES / f"sweep{Path(name).suffix}.jinja"
    template = file.read_text(encoding="utf-8")
    return environment.from_string(template).render(
        sweep=report.sweep,
        name=report.folder.name,
        header=header(report),
        rows=[(row, cells(report, row)) for row in report.rows],
        pictures=pictures,
        origins=report.origins,
        done=sum(r.state == "done" for row in report.rows for r in row.results),
        count=sum(len(row.results) for row in report.rows),
        command=shlex.join,
        percent=round(100 * seed_statistics.LEVEL),
        comparisons=len(report.rows) - 1,
        baseline=sweep_plots.label(report.baseline),
    )


def header(report: SweepReport) -> list[str]:
    """The names of the table's columns."""
    percent = round(100 * seed_statistics.LEVEL)
    return [
        *report.axes,
        "seeds",
        f"{report.sweep['metric']}, mean",
        f"{percent} % interval",
        "against the baseline",
        f"{percent} % interval",
        "verdict",
        "time a run",
        "tokens",
        "chip-hours",
    ]


def cells(report: SweepReport, row: PointResult) -> list[str]:
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
        duration(row.seconds) if found else "-",
        f"{row.tokens:,.0f}" if found else "-",
        f"{row.chip_hours:.3f}" if found else "-",
    ]


def _between(found: Any, sign: str = "") -> str:
    if found is None or not math.isfinite(found.half):
        return "-"
    return f"{found.low:{sign}.4f} to {found.high:{sign}.4f}"
