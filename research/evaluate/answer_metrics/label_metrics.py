"""Metrics for classification, with the labels that the rows' references are."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from research.core.errors import UserError
from research.evaluate.answer_metrics.answer_metric import SHARE, AnswerMetric
from research.evaluate.answer_metrics.short_answers import Words, holds
from research.evaluate.answer_metrics.words_of_text import comparable, letters_of
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.statistics import measured
from research.evaluate.statistics.measured import Floats, Measured

MOST_LABELS = 1000
# References are labels if each has at most so many words, and occurs twice on average.
LABEL_WORDS, LABEL_ROWS = 5, 2


def labelled_categories(rows: Sequence[AnsweredRow]) -> set[str]:
    """The categories of rows whose references are labels.

    They are few words each, at least two, and occur at least twice on average.
    """
    references = defaultdict(list)
    for row in rows:
        if row.references:
            references[row.category].append(row.reference or row.references[0])
    found = set()
    for category, texts in references.items():
        labels = {comparable(text, text) for text in texts}
        many = len(texts) >= LABEL_ROWS * len(labels)
        if many and len(labels) >= 2 and max(map(len, labels)) <= LABEL_WORDS:
            found.add(category)
    return found


def labels_of(rows: Sequence[AnsweredRow]) -> list[str]:
    """The different references of `rows`, as first written.

    Raises:
      UserError: there are too many to be labels.
    """
    found: dict[Words, str] = {}
    for row in rows:
        for text in row.references:
            found.setdefault(comparable(text, text), text)
    if len(found) > MOST_LABELS:
        raise _no_labels(rows, found, f"at most {MOST_LABELS} are labels")
    return list(found.values())


def require_labels(rows: Sequence[AnsweredRow]) -> None:
    """Raises UserError where the references of `rows` are texts, not labels.

    There are too many, or no two are equal and one is longer than a label is.
    """
    words = [comparable(label, label) for label in labels_of(rows)]
    given = sum(len(row.references) for row in rows)
    if len(words) == given > 1 and max(map(len, words)) > LABEL_WORDS:
        raise _no_labels(
            rows, words, f"labels repeat or have at most {LABEL_WORDS} words"
        )


def _no_labels(
    rows: Sequence[AnsweredRow], found: Collection[Words], rule: str
) -> UserError:
    return UserError(
        f"accuracy and macro_f1 take the references as labels, and the references of "
        f"{len(rows)} rows are {len(found)} different texts, where {rule}; use "
        "exact_match or token_f1"
    )


def _labels_by_category(rows: Sequence[AnsweredRow]) -> Mapping[str, Sequence[str]]:
    """The labels that each row's answer may name.

    A category with labels of its own has these: "bad, no doubt" names one of good and
    bad, whatever rows with yes and no the file has. The other categories share theirs.
    """
    own = labelled_categories(rows)
    shared = labels_of([row for row in rows if row.category not in own])
    return defaultdict(
        lambda: shared,
        {
            name: labels_of([row for row in rows if row.category == name])
            for name in own
        },
    )


def label_in(answer: str, labels: Sequence[str]) -> str | None:
    """The label that the answer is, or else the only one that it names.

    Where it names several, the only one that its first line names; else None. A label
    inside a longer one that is named (`positive` in `very positive`) does not count,
    and the case of a single letter does: `a` is a word where A is a label.
    """
    for label in labels:
        if comparable(answer, label) == comparable(label, label):
            return label
    first_line = answer.strip().partition("\n")[0]
    for text in (answer, first_line):
        named = _named_in(text, labels)
        if len(named) <= 1:
            break
    return named[0] if len(named) == 1 else None


def _named_in(text: str, labels: Sequence[str]) -> list[str]:
    named = [label for label in labels if _names(text, label)]
    return [
        label
        for label in named
        if not any(other != label and _names(other, label) for other in named)
    ]


def _names(text: str, label: str) -> bool:
    letter = label.strip()
    if len(letter) == 1 and letter.swapcase() != letter:
        return letter in letters_of(text)
    return holds(text, label)


def _counted(rows: Sequence[AnsweredRow]) -> tuple[list[str | None], list[str], Floats]:
    """The label in each answer, the right label, and counts [rows, labels, 3].

    The counts are those of right answers, of answers and of references. Where several
    labels are right, the one that was answered is, or else the first.
    """
    labels, own = labels_of(rows), _labels_by_category(rows)
    names = {comparable(label, label): place for place, label in enumerate(labels)}
    counts = np.zeros((len(rows), len(labels), 3))
    answered, right = [], []
    for count, row in zip(counts, rows, strict=True):
        named = label_in(row.answer, own[row.category])
        label, *expected = (
            None if text is None else labels[names[comparable(text, text)]]
            for text in (named, *row.references)
        )
        truth = label if label in expected else expected[0]
        answered.append(label)
        right.append(truth)
        count[labels.index(truth), 2] += 1
        if label is not None:
            count[labels.index(label), 1] += 1
            count[labels.index(label), 0] += label == truth
    return answered, right, counts


def _accuracy(rows: Sequence[AnsweredRow]) -> Measured:
    answered, right, _ = _counted(rows)
    pairs = zip(answered, right, strict=True)
    return measured.mean([float(label == truth) for label, truth in pairs])


def _macro_f1(rows: Sequence[AnsweredRow]) -> Measured:
    answered, right, counts = _counted(rows)
    pairs = zip(answered, right, strict=True)
    scores = tuple(float(label == truth) for label, truth in pairs)
    return Measured(scores, counts.reshape(len(rows), counts.shape[1] * 3), _f1_of_sums)


def _f1_of_sums(sums: Floats) -> Floats:
    """The mean F1 over the labels that occur among the references."""
    counts = sums.reshape(*sums.shape[:-1], sums.shape[-1] // 3, 3)
    right, answered, expected = np.moveaxis(counts, -1, 0)
    f1 = 2 * right / np.maximum(answered + expected, 1)
    occurs = expected > 0
    with np.errstate(invalid="ignore"):
        return np.sum(f1 * occurs, -1) / np.sum(occurs, -1)


def _named(rows: Sequence[AnsweredRow]) -> Measured:
    answered, _, _ = _counted(rows)
    return measured.mean([float(label is not None) for label in answered])


READ_AS = "the answer is a label of the rows, or it (or its first line) names one only"
ACCURACY = AnswerMetric(
    "accuracy",
    SHARE,
    True,
    True,
    f"share of answers with the right label; {READ_AS}",
    _accuracy,
)
MACRO_F1 = AnswerMetric(
    "macro_f1",
    SHARE,
    True,
    True,
    f"mean over labels of the F1 of each, labels of the references only; {READ_AS}",
    _macro_f1,
)
LABEL_NAMED = AnswerMetric(
    "label_named",
    SHARE,
    None,  # A wrong label is named, too.
    True,
    f"share of answers in which a label was found: {READ_AS}",
    _named,
)
