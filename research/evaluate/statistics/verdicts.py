"""A comparison in plain words."""

from typing import Protocol

from research.evaluate.statistics.resampling import smallest_p

ALPHA = 0.05
BETTER, WORSE = "better", "worse"
HIGHER, LOWER = "higher", "lower"
NOTHING_SHOWN = "no difference shown"
TOO_FEW = "too few rows to tell"


class _Compared(Protocol):
    difference: float
    low: float | None
    high: float | None
    clusters: int


def verdict(
    compared: _Compared, adjusted_p: float, tests: int, higher_is_better: bool | None
) -> str:
    """One of the six words of this file.

    A difference is shown if the interval excludes 0 and the adjusted p-value is at most
    0.05. Otherwise, with so few rows that even the smallest p of `tests` tests would
    not be significant, there are too few rows to tell.
    """
    few = smallest_p(compared.clusters) * max(tests, 1) > ALPHA
    if compared.low is None or (few and adjusted_p > ALPHA):
        return TOO_FEW
    if adjusted_p > ALPHA or compared.low <= 0 <= compared.high:
        return NOTHING_SHOWN
    if higher_is_better is None:
        return HIGHER if compared.difference > 0 else LOWER
    return BETTER if (compared.difference > 0) == higher_is_better else WORSE
