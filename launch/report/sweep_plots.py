"""The plots of a sweep's report, as SVG text."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from launch.report.seed_statistics import PERCENT, Interval
from launch.report.sweep_results import PointResult, RunResult, SweepReport
from research.core.visible_text import visible

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# A fixed salt: the same runs give the same bytes.
STYLE = {
    "svg.hashsalt": "sweep",
    "svg.fonttype": "none",
    "font.size": 9,
    # A label is free text, and two $ in it are no formula.
    "text.parse_math": False,
}


def curves(report: SweepReport) -> str:
    """Plots the metric over the steps, and its paired difference to the baseline."""
    by_point = {row.point: row.results for row in report.rows}
    baseline = {r.seed: dict(r.curve) for r in by_point.get(report.baseline, ())}

    def draw(left: Axes, right: Axes) -> None:
        drawn = []
        for index, (point, results) in enumerate(by_point.items()):
            style = {"color": f"C{index % 10}", "label": label(point)}
            drawn += _band(left, [dict(r.curve) for r in results], style)
            if point != report.baseline:
                _band(right, [_against(r, baseline) for r in results], style)
        left.set(xlabel="step", ylabel=report.sweep["metric"], title="held out")
        right.axhline(0, color="0.4", linewidth=1)
        right.set(xlabel="step", title=f"minus {label(report.baseline)}, same seed")
        # Names stand beside lines: a label that begins with "_" would be hidden.
        names = [label(point) for point in by_point]
        left.legend(
            drawn, names, fontsize=7, title=label(report.axes), title_fontsize=7
        )
        for one in (left, right):
            one.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _picture(draw)


def _against(result: RunResult, baseline: Mapping[int, dict[int, float]]) -> dict:
    known = baseline.get(result.seed, {})
    return {step: value - known[step] for step, value in result.curve if step in known}


def _band(
    axes: Axes, found: Sequence[dict[int, float]], style: dict[str, Any]
) -> list[Any]:
    """Draws the mean over the seeds and the range from the lowest to the highest.

    Returns:
      The line of the mean.
    """
    by_step: dict[int, list[float]] = {}
    for curve in found:
        for step, value in curve.items():
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    means = [np.mean(by_step[s]) for s in steps]
    line = axes.plot(steps, means, "o-", markersize=3, **style)
    axes.fill_between(
        steps,
        [min(by_step[s]) for s in steps],
        [max(by_step[s]) for s in steps],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
    return line


def along(report: SweepReport, index: int) -> str:
    """Plots the last metric along axis `index`, one line for each other point.

    The left plot shows the metric, the right one its paired difference to the baseline.
    If seeds differ more than points do, only the right one separates the points.
    """
    axis = report.sweep["axes"][index]
    positions, scale = _positions(axis)
    lines: dict[tuple[str, ...], list[PointResult]] = {}
    for row in sorted(report.rows, key=lambda row: positions[row.point[index]]):
        if row.found:
            rest = (*row.point[:index], *row.point[index + 1 :])
            lines.setdefault(rest, []).append(row)

    def draw(left: Axes, right: Axes) -> None:
        drawn = []
        for number, rows in enumerate(lines.values()):
            style = {"color": f"C{number % 10}", "fmt": "o-" if scale else "o"}
            at = {positions[row.point[index]]: row for row in rows}
            for x, row in at.items():
                values = [r.value for r in row.results if r.value is not None]
                left.plot(
                    [x] * len(values), values, ".", color=style["color"], alpha=0.5
                )
            drawn += _bars(left, {x: row.found for x, row in at.items()}, style)
            compared = {
                x: r.comparison.difference for x, r in at.items() if r.comparison
            }
            _bars(right, compared, style)
        left.set(ylabel=f"{report.sweep['metric']}, {PERCENT} %", title="held out")
        right.axhline(0, color="0.4", linewidth=1)
        right.set(title=f"minus {label(report.baseline)}, same seed, {PERCENT} %")
        for one in (left, right):
            if scale:
                one.set_xscale(scale)
            one.set_xticks([*positions.values()], [label([x]) for x in positions])
            one.minorticks_off()
            one.set(xlabel=label([axis["name"]]))
            one.margins(x=0.1)
        if len(lines) > 1:
            left.legend(drawn, [label(rest) for rest in lines], fontsize=7)

    return _picture(draw)


def _bars(
    axes: Axes, found: Mapping[float, Interval], style: dict[str, Any]
) -> list[Any]:
    """Draws means and their intervals by place on the axis; returns what it drew."""
    if not found:
        return []
    halves = [x.half if math.isfinite(x.half) else 0.0 for x in found.values()]
    means = [x.mean for x in found.values()]
    return [axes.errorbar([*found], means, yerr=halves, capsize=3, **style)]


def _positions(axis: dict[str, Any]) -> tuple[dict[str, float], str]:
    """The place of each label, and the scale; it is empty if a label is no number."""
    labels = list(axis["points"])
    try:
        numbers = {name: float(name) for name in labels}
    except ValueError:
        numbers = {}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        return {name: float(i) for i, name in enumerate(labels)}, ""
    low, high = min(numbers.values()), max(numbers.values())
    return numbers, "log" if high >= 8 * low > 0 else "linear"


def label(point: Sequence[str]) -> str:
    """The names of a point, as every picture shows them."""
    return visible(", ".join(point))


def _picture(draw: Callable[[Axes, Axes], None]) -> str:
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 3.6))
        draw(*axes)
        for one in axes:
            one.grid(alpha=0.3)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    # A page can contain the SVG only without the head of an XML file.
    return text.getvalue()[text.getvalue().index("<svg") :]
