"""The best run of a sweep, and how sure that is, in words."""

import dataclasses
import math

from launch.report import seed_statistics
from launch.report.seed_statistics import LEVEL, PERCENT, PairedComparison
from launch.report.sweep_results import PointResult, RunResult, SweepReport
from launch.sweep import sweep_runs

NAMED = 5  # points of one sentence; the rest are counted


@dataclasses.dataclass(frozen=True)
class BestRun:
    """The point with the lowest mean, and its run with the lowest value.

    Attributes:
      words: sentences on the point and on how sure it is.
      flags: the knobs of the point.
    """

    words: str
    flags: str
    run: RunResult


def find_best(report: SweepReport) -> BestRun | None:
    """The best run so far; None if no run is done.

    Only points whose every run is done are compared, or else those with most runs done:
    a mean over fewer seeds is one of other rows.
    """
    most = max(len(row.done) for row in report.rows)
    if not most:
        return None
    whole = [row for row in report.rows if len(row.done) == len(row.results)]
    rows = whole or [row for row in report.rows if len(row.done) == most]
    best = min(rows, key=lambda row: row.found.mean)
    said = [_lowest(report, best), *_certainty(report, best, rows)]
    left = len(report.rows) - len(rows)
    if left:
        points = "point is" if left == 1 else "points are"
        said.append(f"{left} {points} not compared: some of their runs are not done.")
    knobs = {
        knob: value
        for axis, label in zip(report.sweep["axes"], best.point, strict=True)
        for knob, value in axis["points"][label].items()
    }
    flags = " ".join(sweep_runs.flag(*knob) for knob in knobs.items())
    run = min(best.done, key=lambda result: result.value)
    return BestRun(" ".join(said), flags, run)


def _lowest(report: SweepReport, best: PointResult) -> str:
    found = best.found
    name = ", ".join(map("=".join, zip(report.axes, best.point, strict=True)))
    said = f"{name} has the lowest mean {report.sweep['metric']}: {found.mean:.4f}"
    if not math.isfinite(found.half):
        return f"{said}, with one seed."
    between = f"{found.low:.4f} to {found.high:.4f}"
    return f"{said} over {found.count} seeds, {PERCENT} % interval {between}."


def _certainty(
    report: SweepReport, best: PointResult, rows: list[PointResult]
) -> list[str]:
    """Sentences on how the best point compares with every other one."""
    if best.found.count < 2:
        return [
            "With one seed nothing is known about noise: another seed may make another "
            "point the best."
        ]
    values = {row.point: {r.seed: r.value for r in row.done} for row in rows}
    pairs = seed_statistics.compare_all(values)
    better, alike = [], []
    for row in sorted(rows, key=lambda row: row.found.mean):
        if row is best:
            continue
        name = ", ".join(row.point)
        # The table corrects comparisons with the baseline, which were planned.
        if row.point == report.baseline:
            compared = (best.comparison, best.adjusted)
        elif best.point == report.baseline:
            compared = (row.comparison, row.adjusted)
        else:
            compared = pairs[best.point, row.point]
        if _differs(*compared):
            better.append(f"{name} (by {row.found.mean - best.found.mean:.4f})")
        else:
            alike.append(name)
    said = []
    if better:
        said.append(f"It is better than {_listed(better)}.")
    if alike:
        seeds = f"{best.found.count} seeds"
        said.append(f"It is not distinguishable from {_listed(alike)} at {seeds}.")
    return said


def _differs(compared: PairedComparison | None, adjusted: float) -> bool:
    return compared is not None and adjusted < 1 - LEVEL


def _listed(names: list[str]) -> str:
    if len(names) > NAMED:
        names = [*names[:NAMED], f"{len(names) - NAMED} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
