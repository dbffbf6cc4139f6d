"""Writes a sweep's report: `report.html`, a single file, `report.md` and `.json`."""

import shlex
from pathlib import Path

from launch.report import best_run, sweep_plots, sweep_results, sweep_values
from launch.report.seed_statistics import PERCENT
from launch.report.sweep_results import SweepReport
from research.core.text_templates import fill
from research.core.visible_text import visible
from research.report import run_page
from research.report.markdown_text import escaped

TEMPLATES = Path(__file__).parent / "templates"


def write(folder: Path) -> list[Path]:
    """Reads the sweep in `folder` and writes its values, both pages and the plots.

    Raises:
      UserError: there is no sweep, or its runs do not measure its metric.
    """
    report = sweep_results.load(folder)
    pictures = {"curves": sweep_plots.curves(report)}
    for index in range(len(report.axes)):
        pictures[f"axis-{index + 1}"] = sweep_plots.along(report, index)
    for name, svg in pictures.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    written = [sweep_values.write(report)]
    for name in ("report.html", "report.md"):
        path = folder / name
        path.write_text(_render(name, report, pictures), encoding="utf-8")
        written.append(path)
    return written


def _render(name: str, report: SweepReport, pictures: dict[str, str]) -> str:
    return fill(
        TEMPLATES / f"sweep{Path(name).suffix}.jinja",
        lambda value: visible(value) if type(value) is str else value,
        filters={"literal": escaped},
        autoescape=name.endswith(".html"),
        base=run_page.STYLED,
        sweep=report.sweep,
        name=report.folder.name,
        best=best_run.find_best(report),
        header=sweep_values.header(report),
        rows=[(row, sweep_values.cells(row)) for row in report.rows],
        pictures=pictures,
        origins=report.origins,
        done=sum(r.state == "done" for row in report.rows for r in row.results),
        count=sum(len(row.results) for row in report.rows),
        command=shlex.join,
        percent=PERCENT,
        comparisons=len(report.rows) - 1,
        baseline=sweep_plots.label(report.baseline),
    )
