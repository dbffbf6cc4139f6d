"""Means over seeds, their intervals, and what paired differences allow to say."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, by Student's t with n - 1 degrees.

    Attributes:
      count: values it is of.
      mean: of them.
      half: of the interval's width; infinite for fewer than two values.
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
    """Of one or more values that are finite."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(count, mean, math.inf)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(count, mean, _quantile(count) * error)


@functools.cache
def _quantile(count: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """A point against the baseline, over the seeds that both have.

    Attributes:
      difference: point minus baseline, seed by seed.
      p: of a paired t-test, two-sided; 1 where it cannot be made.
    """

    difference: Interval
    p: float


def compare(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedComparison | None:
    """By seed; None where no seed is in both."""
    shared = sorted(values.keys() & baseline.keys())
    if not shared:
        return None
    found = interval([values[seed] - baseline[seed] for seed in shared])
    if found.count < 2:
        return PairedComparison(found, 1.0)
    if found.half == 0:  # To the last digit the same difference at every seed.
        return PairedComparison(found, 0.0 if found.mean else 1.0)
    t = found.mean / (found.half / _quantile(found.count))
    return PairedComparison(found, float(2 * stats.t.sf(abs(t), found.count - 1)))


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for how many there are (Holm 1979), in the same order."""
    adjusted = [1.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(found: PairedComparison | None, adjusted: float, comparisons: int) -> str:
    """In words; less is better. `adjusted` is its p value by `holm`."""
    if found is None:
        return "no seed in common with the baseline"
    difference = found.difference
    if difference.count < 2:
        return "not distinguishable: one seed says nothing of chance"
    if adjusted < 1 - LEVEL:
        word = "better" if difference.mean < 0 else "worse"
        return f"{word} than the baseline by {abs(difference.mean):.4f}"
    said = f"not distinguishable at {difference.count} seeds"
    if difference.low > 0 or difference.high < 0:
        said += f" (alone it would be; it is one of {comparisons} comparisons)"
    return said
