"""Reads the files of a sweep's runs into the rows of its report."""

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.jobs import restart_policy
from launch.report import seed_statistics
from launch.report.seed_statistics import Interval, PairedComparison
from launch.sweep import sweep_runs
from research.core.errors import UserError
from research.core.json_files import read_json
from research.data.grouped_values import by_group
from research.runs.metrics_file import read_metrics
from research.runs.run_directory import is_complete

STARTS = {"starts": [{"devices": str, "cause": str | None}]}
UNMEASURED = "it did not measure the metric"


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The measurements of one run so far.

    Attributes:
      state: `done`, or its last step and why it ended there.
      curve: `(step, metric)` of each evaluation.
      value: the metric of the last evaluation; None until the run is done.
      seconds: time in training steps; runs that train together share it evenly.
      tokens: tokens trained on, without padding.
      chip_hours: the seconds in hours, times the number of devices.
      origin: code, JAX and devices of its last start; empty before the first.
    """

    name: str
    point: tuple[str, ...]
    seed: int
    command: tuple[str, ...]
    state: str
    curve: tuple[tuple[int, float], ...]
    value: float | None
    seconds: float
    tokens: int
    chip_hours: float
    origin: str


@dataclasses.dataclass(frozen=True)
class PointResult:
    """One point of the sweep, over its seeds.

    Attributes:
      comparison: None for the baseline and if no seed is shared with it.
      adjusted: its p value, corrected for all comparisons with the baseline.
      verdict: the comparison in words.
    """

    point: tuple[str, ...]
    results: tuple[RunResult, ...]
    comparison: PairedComparison | None
    adjusted: float
    verdict: str

    @property
    def done(self) -> list[RunResult]:
        return [result for result in self.results if result.value is not None]

    @property
    def found(self) -> Interval | None:
        """The metric over the seeds that are done; None if none is."""
        values = [result.value for result in self.done]
        return seed_statistics.interval(values) if values else None

    def mean(self, name: str) -> float:
        """The mean of `seconds`, `tokens` or `chip_hours` over finished runs."""
        return statistics.fmean(getattr(result, name) for result in self.done)


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """A sweep and the results of its points.

    Attributes:
      sweep: the content of `sweep.json`.
      rows: the points, in the order of the axes.
    """

    folder: Path
    sweep: dict[str, Any]
    rows: tuple[PointResult, ...]

    @property
    def baseline(self) -> tuple[str, ...]:
        return tuple(self.sweep["baseline"])

    @property
    def axes(self) -> list[str]:
        return [axis["name"] for axis in self.sweep["axes"]]

    @property
    def origins(self) -> dict[str, int]:
        """The different origins of the runs that are done, with their numbers."""
        done = [result for row in self.rows for result in row.done]
        return dict(collections.Counter(result.origin for result in done))


def load(folder: Path) -> SweepReport:
    """Reads `sweep.json` and every run's files.

    Raises:
      UserError: there is no sweep, or its runs do not measure its metric.
    """
    sweep = sweep_runs.read(folder)
    found = [_read(folder, run, sweep["metric"]) for run in sweep["runs"]]
    if any(r.state == UNMEASURED for r in found) and not any(r.curve for r in found):
        raise UserError(
            f"the sweep is judged by {sweep['metric']!r}, which none of its runs "
            f"measures: {_measured(folder, sweep['runs'])}"
        )
    points = dict.fromkeys(result.point for result in found)
    by_point = {p: tuple(r for r in found if r.point == p) for p in points}
    baseline = tuple(sweep["baseline"])
    known = _by_seed(by_point.get(baseline, ()))
    others = [point for point in points if point != baseline]
    compared = [seed_statistics.compare(_by_seed(by_point[p]), known) for p in others]
    adjusted = seed_statistics.holm([c.p if c else 1.0 for c in compared])
    said = {
        point: (c, p, seed_statistics.verdict(c, p, len(others)))
        for point, c, p in zip(others, compared, adjusted, strict=True)
    }
    rows = []
    for point, results in by_point.items():
        comparison, adjusted, verdict = said.get(point, (None, 1.0, "baseline"))
        missing = sum(result.value is None for result in results)
        if missing:
            verdict += f"; {missing} of {len(results)} runs not done"
        rows.append(PointResult(point, results, comparison, adjusted, verdict))
    return SweepReport(folder, sweep, tuple(rows))


def _by_seed(results: Sequence[RunResult]) -> dict[int, float]:
    return {r.seed: r.value for r in results if r.value is not None}


def _read(folder: Path, run: dict[str, Any], metric: str) -> RunResult:
    place = folder / run["name"]
    lines = read_metrics(place)
    train = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    values = [(line["step"], _metric(line, metric)) for line in evaluated]
    curve = [(step, value) for step, value in values if value is not None]
    starts = _history(place)
    seconds = train[-1].get("elapsed_s", 0.0) if train else 0.0
    # The last start names its devices as `8 TPU v5e`.
    devices = int(starts[-1]["devices"].split()[0]) if starts else 1
    if curve and is_complete(place):
        state = "done"
    elif (evaluated or is_complete(place)) and not curve:
        state = UNMEASURED
    elif starts:
        made = train[-1]["step"] if train else 0
        cause = starts[-1]["cause"] or "running, or killed"
        planned = [start["steps"] for start in starts if "steps" in start]
        total = [run["steps"] or "?", *planned][-1]
        state = f"step {made} of {total}: {cause}"
    else:
        state = _unbegun(folder, run["name"])
    return RunResult(
        name=run["name"],
        point=tuple(run["point"]),
        seed=run["seed"],
        command=tuple(run["command"]),
        state=state,
        curve=tuple(curve),
        value=curve[-1][1] if state == "done" else None,
        seconds=seconds,
        tokens=sum(line.get("tokens", 0) for line in train),
        chip_hours=seconds * devices / 3600,
        origin=_origin(starts),
    )


def _unbegun(folder: Path, name: str) -> str:
    """`not begun`, or why a run that never had a start has failed."""
    mark = sweep_runs.failure_of(folder, name)
    if not mark.is_file():
        return "not begun"
    code, _, said = mark.read_text(encoding="utf-8").partition("\n")
    return " ".join(f"failed with {restart_policy.describe(int(code))} {said}".split())


def _metric(line: dict[str, Any], metric: str) -> float | None:
    """The value of `loss`, `bits_per_byte` or `loss/CATEGORY`; None if absent."""
    # Sweeps of earlier versions have another name for it.
    found = line.get(metric.replace("by_group.", "loss/", 1))
    return float(found) if isinstance(found, int | float) else None


def _measured(folder: Path, listed: list[dict[str, Any]]) -> str:
    """Lists the metrics of the first run that has an evaluation."""
    for run in listed:
        for line in read_metrics(folder / run["name"]):
            if line["kind"] == "eval":
                groups = ", ".join(f"loss/{name}" for name in by_group(line, "loss"))
                return f"{run['name']} has loss and {groups}"
    return f"none has an evaluation; {sweep_runs.HOLD_OUT}"


def _history(place: Path) -> list[dict[str, Any]]:
    """The starts in a run's `run.json`; none before it has begun.

    Raises:
      UserError: the file holds something else.
    """
    path = place / "run.json"
    remedy = "restore a copy, or remove it to report the run without its starts"
    return read_json(path, STARTS, remedy, absent={"starts": []})["starts"]


def _origin(starts: list[dict[str, Any]]) -> str:
    if not starts:
        return ""
    made = starts[-1].get("provenance", {})  # Older runs have none.
    code, packages = made.get("code", "unknown"), made.get("packages", {})
    jax = packages.get("jax", "unknown")
    return f"code {code[:12]}, JAX {jax}, {starts[-1]['devices']}"
