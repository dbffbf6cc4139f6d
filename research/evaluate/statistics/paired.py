"""The difference of two models on the same rows: its interval, test, size and words."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.evaluate.statistics import resampling
from research.evaluate.statistics.measured import Floats, Measured
from research.evaluate.statistics.verdicts import ALPHA, verdict

SEED = 0
POWER = 0.8
# Exchanges of two models, in units of those with which the smallest p of a table is
# just 0.05 when it is corrected.
TRIED = 4


@dataclass(frozen=True)
class Estimate:
    """One model's result in one metric, with its 95 % interval.

    The bounds are None where fewer than two clusters of rows have a score.
    """

    value: float
    low: float | None
    high: float | None
    rows: int
    clusters: int


@dataclass(frozen=True)
class Comparison:
    """The difference of a candidate to a baseline, in one metric, on the same rows.

    Attributes:
      baseline, candidate: the values over the rows in which both have a score.
      difference: candidate less baseline.
      low, high: its 95 % interval; None for fewer than two clusters.
      p_value: of the permutation test, for this metric alone.
      effect_size: the difference in standard deviations of one cluster's difference
        (Cohen's d of paired samples); None where all clusters differ by the same.
      rows: those in which both have a score.
      clusters: groups of rows that repeat; independent rows are one each.
      rows_needed: rows of this kind with which a difference of this size would be
        found in 80 of 100 test files; None where the models do not differ, or for
        fewer than two clusters, which do not show how rows vary.
      differing: clusters in which the two models differ at all.
    """

    baseline: float
    candidate: float
    difference: float
    low: float | None
    high: float | None
    p_value: float
    effect_size: float | None
    rows: int
    clusters: int
    rows_needed: int | None
    differing: int


@dataclass(frozen=True)
class Judged:
    """A comparison among others: `adjusted_p` is Holm's, `verdict` is in words."""

    comparison: Comparison
    adjusted_p: float
    verdict: str


def estimate(
    measured: Measured, clusters: Sequence[Hashable], seed: int = SEED
) -> Estimate | None:
    """One model's value and interval; None if the metric applies to no row."""
    kept = measured.applies
    if measured.value is None:
        return None
    sums = _by_cluster(measured.sums[kept], clusters, kept)
    low, high = resampling.bootstrap(sums, measured.value_of, seed) or (None, None)
    return Estimate(measured.value, low, high, int(kept.sum()), len(sums))


def compare(
    baseline: Measured,
    candidate: Measured,
    clusters: Sequence[Hashable],
    seed: int = SEED,
) -> Comparison | None:
    """Two models on the same rows; None if no row has a score of both.

    Args:
      clusters: for each row the cluster that it is in.
    """
    one, two, rows = _paired_sums(baseline, candidate, clusters)
    if not rows:
        return None
    value_of = baseline.value_of
    width = baseline.sums.shape[1]

    def gap(both: Floats) -> Floats:
        return value_of(both[..., width:]) - value_of(both[..., :width])

    both = np.concatenate([one, two], axis=1)
    values = [float(value_of(sums.sum(0))) for sums in (one, two)]
    if not np.all(np.isfinite(values)):
        return None
    count = len(one)
    difference = values[1] - values[0]
    low, high = resampling.bootstrap(both, gap, seed) or (None, None)
    error = resampling.standard_error(both, gap)
    effect, needed = (None, None) if difference else (0.0, None)
    if error > resampling.ROUNDING * abs(difference):
        effect = difference / (error * math.sqrt(count))
    if difference and count > 1:
        needed = _rows_needed(effect, rows / count)
    return Comparison(
        *values,
        difference=difference,
        low=low,
        high=high,
        p_value=resampling.permutation_p(one, two, value_of, seed),
        effect_size=effect,
        rows=rows,
        clusters=count,
        rows_needed=needed,
        differing=int((one != two).any(1).sum()),
    )


def compare_runs(
    baseline: Mapping[str, Measured],
    runs: Mapping[str, Mapping[str, Measured]],
    clusters: Sequence[Hashable],
    higher_is_better: Mapping[str, bool | None],
    seed: int = SEED,
) -> dict[str, dict[str, Judged]]:
    """Several runs against one baseline: by run, then by metric.

    Holm's correction is over all metrics of all runs, which are one table. Those in
    which too few rows differ for any result below 0.05 are no tests (Tarone 1990, doi
    10.2307/2531456). In a large table more exchanges are tried, so that the smallest p
    survives the correction. A metric that has no row in common is missing from its run.
    """
    found = {
        (run, metric): comparison
        for run, metrics in runs.items()
        for metric, measured in metrics.items()
        if metric in baseline
        and (comparison := compare(baseline[metric], measured, clusters, seed))
    }
    tests = [
        key
        for key, each in found.items()
        if resampling.smallest_p(each.differing) <= ALPHA
    ]
    exchanges = math.ceil(TRIED * len(tests) / ALPHA)
    for run, metric in tests:
        each = found[run, metric]
        if each.p_value <= ALPHA and exchanges > resampling.exchanges_of(each.clusters):
            one, two, _ = _paired_sums(baseline[metric], runs[run][metric], clusters)
            value_of = baseline[metric].value_of
            p_value = resampling.permutation_p(one, two, value_of, seed, exchanges)
            found[run, metric] = dataclasses.replace(each, p_value=p_value)
    corrected = dict(
        zip(tests, holm([found[key].p_value for key in tests]), strict=True)
    )
    judged: dict[str, dict[str, Judged]] = {run: {} for run in runs}
    for (run, metric), each in found.items():
        p_value = corrected.get((run, metric), 1.0)
        words = verdict(each, p_value, len(tests), higher_is_better.get(metric))
        judged[run][metric] = Judged(each, p_value, words)
    return judged


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: at 0.05 the chance of any false difference is at most 5 %.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _paired_sums(
    baseline: Measured, candidate: Measured, clusters: Sequence[Hashable]
) -> tuple[Floats, Floats, int]:
    """Both sums by cluster, and of how many rows: those in which both have a score."""
    kept = baseline.applies & candidate.applies
    one, two = (
        _by_cluster(x.sums[kept], clusters, kept) for x in (baseline, candidate)
    )
    return one, two, int(kept.sum())


def _by_cluster(sums: Floats, clusters: Sequence[Hashable], kept: np.ndarray) -> Floats:
    """Sums [rows, k] to [clusters, k], in the order of each cluster's first row."""
    numbers: dict[Hashable, int] = {}
    owners = [
        numbers.setdefault(name, len(numbers))
        for name, keep in zip(clusters, kept, strict=True)
        if keep
    ]
    added = np.zeros((len(numbers), sums.shape[1]))
    np.add.at(added, owners, sums)
    return added


def _rows_needed(effect: float | None, rows_per_cluster: float) -> int:
    """For one two-sided test at 5 % with 80 % power.

    clusters = ((z(0.975) + z(0.8)) / effect) ** 2 + z(0.975) ** 2 / 2 (Guenther 1981,
    doi 10.2307/2683298), and at least as many as the permutation test needs to reach
    5 % at all.
    """
    from scipy import special  # Late: no training waits for it before its first step.

    least = math.ceil(1 - math.log2(ALPHA))
    tail = float(special.ndtri(1 - ALPHA / 2))
    reach = tail + float(special.ndtri(POWER))
    clusters = max(least, (reach / effect) ** 2 + tail**2 / 2) if effect else least
    return math.ceil(clusters * rows_per_cluster)
