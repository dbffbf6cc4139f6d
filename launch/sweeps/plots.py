"""The report's pictures, as SVG text."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from launch.sweeps import statistics
from launch.sweeps.results import Report, Result, Row

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# The same runs give the same bytes.
STYLE = {"svg.hashsalt": "sweep", "svg.fonttype": "none", "font.size": 9}


def curves(report: Report) -> str:
    """The metric over the steps, and its paired difference to the baseline."""
    by_point = {row.point: row.results for row in report.rows}
    baseline = {r.seed: dict(r.curve) for r in by_point.get(report.baseline, ())}

    def draw(axes: Sequence[Axes]) -> None:
        left, right = axes
        for index, (point, results) in enumerate(by_point.items()):
            style = {"color": f"C{index % 10}", "label": label(point)}
            _band(left, [dict(r.curve) for r in results], style)
            if point != report.baseline:
                _band(right, [_against(r, baseline) for r in results], style)
        left.set(xlabel="step", ylabel=report.sweep["metric"], title="held out")
        right.axhline(0, color="0.4", linewidth=1)
        right.set(xlabel="step", title=f"minus {label(report.baseline)}, same seed")
        left.legend(fontsize=7)
        for one in axes:
            one.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _picture(2, draw)


def _against(result: Result, baseline: Mapping[int, dict[int, float]]) -> dict:
    known = baseline.get(result.seed, {})
    return {step: value - known[step] for step, value in result.curve if step in known}


def _band(axes: Axes, found: Sequence[dict[int, float]], style: dict[str, Any]) -> None:
    """Mean over the seeds, and from the lowest to the highest of them."""
    by_step: dict[int, list[float]] = {}
    for curve in found:
        for step, value in curve.items():
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    axes.plot(steps, [np.mean(by_step[s]) for s in steps], "o-", markersize=3, **style)
    axes.fill_between(
        steps,
        [min(by_step[s]) for s in steps],
        [max(by_step[s]) for s in steps],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )


def along(report: Report, index: int) -> str:
    """The metric at the end along axis `index`, a line for each of the other points."""
    axis = report.sweep["axes"][index]
    labels = list(axis["points"])
    positions, scale = _positions(axis)
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        if row.found:
            rest = (*row.point[:index], *row.point[index + 1 :])
            lines.setdefault(rest, []).append(row)

    def draw(axes: Sequence[Axes]) -> None:
        (one,) = axes
        for number, (rest, rows) in enumerate(lines.items()):
            rows = sorted(rows, key=lambda row: positions[row.point[index]])
            at = [positions[row.point[index]] for row in rows]
            color = f"C{number % 10}"
            for x, row in zip(at, rows, strict=True):
                values = [r.value for r in row.results if r.value is not None]
                one.plot([x] * len(values), values, ".", color=color, alpha=0.5)
            halves = [row.found.half for row in rows]
            one.errorbar(
                at,
                [row.found.mean for row in rows],
                yerr=halves if all(map(math.isfinite, halves)) else None,
                fmt="o-" if scale else "o",
                capsize=3,
                color=color,
                label=label(rest) if rest else None,
            )
        if scale:
            one.set_xscale(scale)
        one.set_xticks([positions[x] for x in labels], labels)
        one.minorticks_off()
        percent = round(100 * statistics.LEVEL)
        one.set(xlabel=axis["name"], ylabel=f"{report.sweep['metric']}, {percent} %")
        if len(lines) > 1:
            one.legend(fontsize=7)

    return _picture(1, draw)


def _positions(axis: dict[str, Any]) -> tuple[dict[str, float], str]:
    """Where each label stands, and the scale; empty where labels have no order."""
    labels = list(axis["points"])
    try:
        numbers = {name: float(name) for name in labels}
    except ValueError:
        return {name: float(i) for i, name in enumerate(labels)}, ""
    low, high = min(numbers.values()), max(numbers.values())
    return numbers, "log" if high >= 8 * low > 0 else "linear"


def label(point: Sequence[str]) -> str:
    return ", ".join(point)


def _picture(count: int, draw: Callable[[Sequence[Axes]], None]) -> str:
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            1, count, figsize=(5.2 * count, 3.6), squeeze=False
        )
        draw(axes[0])
        for one in axes[0]:
            one.grid(alpha=0.3)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    # Without the head of an XML file it can stand in a page.
    return text.getvalue()[text.getvalue().index("<svg") :]
