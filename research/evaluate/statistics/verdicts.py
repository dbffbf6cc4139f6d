"""A comparison in plain words."""

from collections.abc import Collection, Mapping
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
    0.05. With so few rows that no result could reach 0.05 among `tests` tests, there
    are too few rows to tell.
    """
    if compared.low is None or smallest_p(compared.clusters) * max(tests, 1) > ALPHA:
        return TOO_FEW
    if adjusted_p > ALPHA or compared.low <= 0 <= compared.high:
        return NOTHING_SHOWN
    if higher_is_better is None:
        return HIGHER if compared.difference > 0 else LOWER
    return BETTER if (compared.difference > 0) == higher_is_better else WORSE


def loss_against_answers(
    verdicts: Mapping[str, str], losses: Collection[str]
) -> str | None:
    """The first sentence to say of a run whose loss and answers disagree, or None.

    Args:
      verdicts: of each metric; those named in `losses` are losses, the rest answers.
    """
    better = [name for name, word in verdicts.items() if word == BETTER]
    worse = [name for name, word in verdicts.items() if word == WORSE]
    lower_losses = [name for name in better if name in losses]
    worse_answers = [name for name in worse if name not in losses]
    if not lower_losses or not worse_answers:
        return None
    return (
        f"{', '.join(lower_losses)} got better while the answers got worse in "
        f"{', '.join(worse_answers)}: trust the answers, and look at the worst rows"
    )
