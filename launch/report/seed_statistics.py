"""Means over seeds, their intervals, and what paired differences allow to say."""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
PERCENT = round(100 * LEVEL)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, by Student's t with n - 1 degrees.

    Attributes:
      count: of the values.
      half: half of the interval's width; infinite for fewer than two values.
    """

    count: int
    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """The interval of one or more finite values."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(count, mean, math.inf)
    quantile = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    return Interval(count, mean, float(stats.sem(values) * quantile))


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """A point against the baseline, over the seeds that both have.

    Attributes:
      difference: point minus baseline, seed by seed.
      p: p value of a two-sided paired t-test; 1 for a single seed.
    """

    difference: Interval
    p: float


def compare(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedComparison | None:
    """Compares values by seed; None if no seed has both."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    mine, other = ([found[seed] for seed in seeds] for found in (values, baseline))
    difference = interval(np.subtract(mine, other).tolist())
    if len(seeds) < 2:
        p = 1.0
    elif difference.half == 0:  # Every seed differs by exactly the same amount.
        p = 0.0 if difference.mean else 1.0
    else:
        # SciPy's own test warns if the differences are equal to the last digits.
        size = len(seeds) - 1
        sem = difference.half / stats.t.ppf((1 + LEVEL) / 2, size)
        p = float(2 * stats.t.sf(abs(difference.mean) / sem, size))
    return PairedComparison(difference, p)


def compare_all(
    points: Mapping[Hashable, Mapping[int, float]],
) -> dict[tuple[Hashable, Hashable], tuple[PairedComparison | None, float]]:
    """Every point against every other, each with its p value corrected for all pairs.

    A point that was picked because its mean is the lowest may only be compared so: the
    pick has looked at every pair. A pair is found in either order.
    """
    pairs = list(itertools.combinations(points, 2))
    found = [compare(points[one], points[other]) for one, other in pairs]
    adjusted = holm([c.p if c else 1.0 for c in found])
    made = dict(zip(pairs, zip(found, adjusted, strict=True), strict=True))
    return made | {(other, one): pair for (one, other), pair in made.items()}


def holm(values: Sequence[float]) -> list[float]:
    """Corrects p values for their number, in the same order.

    Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure. SciPy corrects
    only for the false discovery rate, which is a weaker promise.
    """
    adjusted = [1.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(found: PairedComparison | None, adjusted: float, comparisons: int) -> str:
    """Says in words how a point compares; less is better.

    `adjusted` is the p value of `found`, corrected by `holm` for all `comparisons`.
    """
    if found is None:
        return "no seed in common with the baseline"
    difference = found.difference
    if difference.count < 2:
        return "not distinguishable: one seed cannot show chance"
    if adjusted < 1 - LEVEL:
        word = "better" if difference.mean < 0 else "worse"
        return f"{word} than the baseline by {abs(difference.mean):.4f}"
    said = f"not distinguishable at {difference.count} seeds"
    if difference.low > 0 or difference.high < 0:
        said += f" (it would be if it were not one of {comparisons} comparisons)"
    return said
