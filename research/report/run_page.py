"""`report.md` and `report.html`: the report of a run for reading later.

Both show the same, and the page also the curves and the log of the run. The page is a
single file, with its pictures inside.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core.text_templates import fill
from research.core.thinning import thin
from research.core.visible_text import visible
from research.report.markdown_text import escaped, fenced, format_table
from research.report.result_tables import (
    tabulate_findings,
    tabulate_losses,
    tabulate_measures,
    tabulate_starts,
    tabulate_wall_time,
    text_columns,
)
from research.report.run_results import COMPARED, RunResults

TEMPLATES = Path(__file__).parent / "templates"
STYLED = TEMPLATES / "page.html.jinja"  # the frame of every page
# The page shows so many characters of a longer text, until a click.
FOLDED, PREVIEW = 1500, 200
# Curves by their field in a line of kind `train`; that of the loss is in the picture.
CURVES = {
    "loss": "training loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_s": "tokens per second",
    "memory_gb": "peak memory, GB",
}
CURVE_POINTS, CURVE_WIDTH, CURVE_HEIGHT = 400, 600, 120


@dataclasses.dataclass(frozen=True)
class DrawnCurve:
    """One curve as a line of SVG.

    Attributes:
      points: `x,y x,y`, in a box of `CURVE_WIDTH` and `CURVE_HEIGHT`.
      low, high, last: values, as text.
      steps: its first and last step.
    """

    title: str
    points: str
    low: str
    high: str
    last: str
    steps: tuple[int, int]


def columns_of(train: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Columns `[steps]` of the lines of training steps; NaN where one has no value."""
    names = ("step", *CURVES)
    return {name: np.array([x.get(name) for x in train], float) for name in names}


def drawn_curves(train: Mapping[str, np.ndarray]) -> list[DrawnCurve]:
    """The curves of some columns, those that have two points."""
    found = []
    for field, title in CURVES.items():
        x, y = train["step"], train[field]
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        if len(x) < 2:
            continue
        low, high = float(y.min()), float(y.max())
        at, values = thin(x, y, CURVE_POINTS)
        across = (at - x[0]) / ((x[-1] - x[0]) or 1.0) * CURVE_WIDTH
        up = (1 - (values - low) / ((high - low) or 1.0)) * CURVE_HEIGHT
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
        shown = (f"{value:.4g}" for value in (low, high, float(y[-1])))
        found.append(DrawnCurve(title, points, *shown, (int(x[0]), int(x[-1]))))
    return found


def format_report(results: RunResults) -> str:
    """The text of `report.md`; `loss.png` is expected beside it."""
    return _fill("run.md.jinja", results)


def format_page(
    results: RunResults,
    picture: bytes = b"",
    train: Mapping[str, np.ndarray] | None = None,
) -> str:
    """The text of `report.html`.

    Args:
      results: of the run.
      picture: a PNG file with the losses; empty, and their curve is drawn.
      train: columns in place of `results.train`, see `columns_of`.
    """
    curves = drawn_curves(columns_of(results.train) if train is None else train)
    return _fill(
        "run.html.jinja",
        results,
        picture=base64.b64encode(picture).decode(),
        curves=[x for x in curves if not picture or x.title != CURVES["loss"]],
        box=(CURVE_WIDTH, CURVE_HEIGHT),
    )


def _fill(name: str, results: RunResults, **more: Any) -> str:
    prompts = dict.fromkeys(sample.prompt for sample in results.samples)
    return fill(
        TEMPLATES / name,
        lambda value: visible(value) if type(value) is str else value,
        filters={
            "literal": lambda value: escaped(str(value)),
            "fenced": fenced,
            "words": text_columns,
            "lines": lambda table: "\n".join(format_table(table)[1:]),
        },
        autoescape=".html" in name,
        base=STYLED,
        results=results,
        losses=tabulate_losses(results.evaluations),
        measures=tabulate_measures(results.measures),
        times=tabulate_wall_time(results.wall_time),
        findings=tabulate_findings(results.findings),
        starts=tabulate_starts(results.starts),
        samples=[(p, [s for s in results.samples if s.prompt == p]) for p in prompts],
        compared=list(COMPARED),
        folded=FOLDED,
        preview=PREVIEW,
        **more,
    )
