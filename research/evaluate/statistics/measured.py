"""A metric's results in the form that a bootstrap needs: sums that add up over rows."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ratio_of_sums(sums: Floats) -> Floats:
    """Sums [..., 2] of numerators and denominators to [...] values; NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's results in one metric.

    Means, ratios, and metrics of a whole corpus (BLEU, macro F1) are all functions of
    sums over rows. A resample of rows is a weighted sum, and no text is read again.

    Attributes:
      scores: one for each row; None where the metric does not apply to the row.
      sums: the row's part of the sums, [rows, k]; zeros where the score is None.
      value_of: sums [..., k] to values [...].
    """

    scores: tuple[float | None, ...]
    sums: Floats
    value_of: Callable[[Floats], Floats]

    def __post_init__(self):
        if len(self.scores) != len(self.sums):
            raise ValueError(
                f"{len(self.scores)} scores, {len(self.sums)} rows of sums"
            )

    @property
    def applies(self) -> NDArray[np.bool_]:
        """Which rows the metric applies to, [rows]."""
        return np.array([score is not None for score in self.scores], bool)

    @property
    def value(self) -> float | None:
        """The metric over all rows to which it applies; None if there is none."""
        if not self.applies.any():
            return None
        value = float(self.value_of(self.sums.sum(0)))
        return value if np.isfinite(value) else None

    def subset(self, rows: Sequence[int]) -> "Measured":
        """The results of these rows, for example of one category."""
        scores = tuple(self.scores[row] for row in rows)
        return Measured(scores, self.sums[np.array(rows, int)], self.value_of)

    def spread_over(self, rows: Sequence[int], count: int) -> "Measured":
        """These results as those of `rows` among `count`; no others have a score."""
        scores: list[float | None] = [None] * count
        for row, score in zip(rows, self.scores, strict=True):
            scores[row] = score
        sums = np.zeros((count, self.sums.shape[1]))
        sums[np.array(rows, int)] = self.sums
        return Measured(tuple(scores), sums, self.value_of)


def mean(scores: Sequence[float | None]) -> Measured:
    """A metric that is the mean of its rows' scores."""
    sums = [(0.0, 0.0) if score is None else (score, 1.0) for score in scores]
    return Measured(tuple(scores), _matrix(sums, 2), ratio_of_sums)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Measured:
    """A metric that divides two sums, as a loss does: nats by tokens.

    It does not apply to a row whose denominator is 0.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    sums = [(0.0, 0.0) if below == 0 else (above, below) for above, below in pairs]
    scores = tuple(None if below == 0 else above / below for above, below in pairs)
    return Measured(scores, _matrix(sums, 2), ratio_of_sums)


def _matrix(rows: Sequence[Sequence[float]], width: int) -> Floats:
    return np.array(rows, np.float64).reshape(len(rows), width)
