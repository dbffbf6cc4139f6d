"""Multiple choice by log-probability: which of a row's choices a model finds likeliest.

The choices are scored as continuations of the row's prompt (engine), and compared here.
Longer choices have lower log-probabilities, so that a normalisation has to be stated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.core.errors import UserError, look_up
from research.evaluate.statistics import measured
from research.evaluate.statistics.measured import Measured

# The names under which public test sets have choices and the right one.
CHOICES = ("choices", "endings", "options")
RIGHT = ("answer", "answerKey", "label", "gold")


@dataclass(frozen=True)
class Choices:
    """The choices of a row, and the place of the right one, from 0."""

    place: str
    texts: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class ScoredChoices:
    """Choices with what a model gave: a sum of nats and a number of tokens for each."""

    choices: Choices
    log_probabilities: tuple[float, ...]
    tokens: tuple[int, ...]


# The divisors of the log-probabilities of a row's choices.
NORMALISATIONS = {
    "none": lambda scored: np.ones(len(scored.tokens)),
    "tokens": lambda scored: np.array(scored.tokens),
    "bytes": lambda scored: np.array(
        [len(text.encode()) for text in scored.choices.texts]
    ),
}


def read_choices(row: Mapping[str, Any], place: str) -> Choices:
    """The choices of a row of a file.

    They are a list of texts, or texts with labels as ARC has them
    (`{"text": [...], "label": [...]}`), in a column of `CHOICES`. The right one, in a
    column of `RIGHT`, is a number from 0 (also as text), a label, a letter, or the text
    of a choice.

    Raises:
      UserError: a column is missing, or the right choice is not among the choices.
    """
    given = _first(row, CHOICES, place, "choices")
    labels: Sequence[Any] = ()
    if isinstance(given, Mapping):
        labels, given = given.get("label") or (), given.get("text")
    if (
        not isinstance(given, Sequence)
        or isinstance(given, str)
        or len(given) < 2
        or not all(isinstance(text, str) and text.strip() for text in given)
    ):
        raise UserError(
            f"{place}: the choices are {str(given)[:60]!r}; they must be a list of at "
            "least two texts that are not empty"
        )
    right = _first(row, RIGHT, place, "the right choice")
    return Choices(place, tuple(given), _place_of(right, given, labels, place))


def _first(
    row: Mapping[str, Any], columns: Sequence[str], place: str, what: str
) -> Any:
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    raise UserError(
        f"{place}: the row has no column for {what}; it must be one of "
        f"{', '.join(columns)}"
    )


def _place_of(
    right: Any, texts: Sequence[str], labels: Sequence[Any], place: str
) -> int:
    letters = [chr(ord("A") + number) for number in range(len(texts))]
    numbers = [str(number) for number in range(len(texts))]
    wanted = str(right).strip()
    # A text that is also a letter or a number is a text; labels of the row come first.
    for names in (labels, texts, letters, numbers):
        places = [at for at, name in enumerate(names) if str(name).strip() == wanted]
        if isinstance(right, int) and names is texts:
            continue
        if len(places) == 1 and places[0] < len(texts):
            return places[0]
    raise UserError(
        f"{place}: the right choice is {right!r}; it must be a number from 0 to "
        f"{len(texts) - 1}, a letter from A to {letters[-1]}, or one of the choices"
    )


def chosen(scored: ScoredChoices, normalisation: str) -> int:
    """The place of the likeliest choice; of equal ones the first.

    Args:
      normalisation: `none`, by the choice's `tokens`, or by its `bytes` of UTF-8 (as
        `acc_norm` of lm-evaluation-harness).

    Raises:
      UserError: there is no such normalisation, or a log-probability is not a number.
    """
    divide = look_up(NORMALISATIONS, normalisation, "the length normalisation")
    values = np.array(scored.log_probabilities)
    if np.isnan(values).any():
        raise UserError(
            f"{scored.choices.place}: a choice's log-probability is not a number; look "
            "at the weights of the model"
        )
    return int(np.argmax(values / np.maximum(divide(scored), 1)))


def measure_choices(scored: Sequence[ScoredChoices], normalisation: str) -> Measured:
    """The share of rows whose likeliest choice is the right one."""
    return measured.mean(
        [float(chosen(each, normalisation) == each.choices.right) for each in scored]
    )
