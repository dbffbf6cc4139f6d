"""One metric of answers: what it is called, which rows it is for, how it measures."""

import dataclasses
from collections.abc import Callable, Sequence

from research.core.errors import UserError
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.statistics import measured
from research.evaluate.statistics.measured import Measured

SHARE = "share"  # from 0 to 1
POINTS = "points"  # from 0 to 100
RATIO = "ratio"

Measure = Callable[[Sequence[AnsweredRow]], Measured]


def every_row(row: AnsweredRow) -> bool:
    """Whether a metric that is for all rows is for this one, too."""
    return True


@dataclasses.dataclass(frozen=True)
class AnswerMetric:
    """A metric of answers.

    Attributes:
      name: as `--metrics` has it.
      unit: `share` (0 to 1), `points` (0 to 100), `ratio`, or a user's own.
      higher_is_better: None where neither direction is.
      needs_reference: it does not apply to rows without a reference.
      note: the definition in a sentence, with its source.
      measure_rows: rows that the metric applies to, to their results.
      is_for: which rows it is for, beside what `needs_reference` says.
    """

    name: str
    unit: str
    higher_is_better: bool | None
    needs_reference: bool
    note: str
    measure_rows: Measure
    is_for: Callable[[AnsweredRow], bool] = every_row

    def applies(self, row: AnsweredRow) -> bool:
        return self.is_for(row) and bool(row.references or not self.needs_reference)

    def measure(self, rows: Sequence[AnsweredRow]) -> Measured:
        """The results of `rows`, None for those that the metric does not apply to.

        Raises:
          UserError: a row has no answer, or the user's function does not do.
        """
        for row in rows:
            if not isinstance(row.answer, str):
                raise UserError(
                    f"{row.place}: the answer is {row.answer!r}, and {self.name} needs "
                    "a text; an empty answer is an empty string"
                )
        places = [place for place, row in enumerate(rows) if self.applies(row)]
        found = self.measure_rows([rows[place] for place in places])
        return found.spread_over(places, len(rows))


def mean_of(score: Callable[[AnsweredRow], float | None]) -> Measure:
    """The measure whose value is the mean of `score` over rows."""
    return lambda rows: measured.mean([score(row) for row in rows])
