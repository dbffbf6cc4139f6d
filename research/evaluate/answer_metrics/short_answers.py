"""Metrics for short expected answers: exact match, token F1, contains."""

from collections import Counter
from collections.abc import Callable

from research.evaluate.answer_metrics.answer_metric import SHARE, AnswerMetric, mean_of
from research.evaluate.answer_metrics.words_of_text import comparable
from research.evaluate.answered_row import AnsweredRow

Words = tuple[str, ...]


def has_run(words: Words, run: Words) -> bool:
    """Whether `run` is a run of whole words of `words`."""
    starts = (at for at, word in enumerate(words) if word == run[0]) if run else ()
    return any(words[at : at + len(run)] == run for at in starts)


def holds(text: str, reference: str) -> bool:
    """Whether the words of `reference` are a run of those of `text`.

    Punctuation inside words is nothing (`U.S.` is US) or ends a word (`answer:yes`).
    """
    return any(
        has_run(
            comparable(text, reference, between),
            comparable(reference, reference, between),
        )
        for between in ("", " ")
    )


def _best(score: Callable[[Words, Words], float]) -> Callable[[AnsweredRow], float]:
    """The best score over a row's references, of (answer, reference)."""

    def best(row: AnsweredRow) -> float:
        return max(
            score(comparable(row.answer, reference), comparable(reference, reference))
            for reference in row.references
        )

    return best


def _equal(answer: Words, reference: Words) -> float:
    return float(answer == reference)


def _token_f1(answer: Words, reference: Words) -> float:
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / max(len(answer) + len(reference), 1)


def _contains(row: AnsweredRow) -> float:
    return float(any(holds(row.answer, reference) for reference in row.references))


SQUAD = "in the form of SQuAD (Rajpurkar et al. 2016), best of all references"
EXACT_MATCH = AnswerMetric(
    "exact_match",
    SHARE,
    True,
    True,
    f"share of answers that are the reference, {SQUAD}",
    mean_of(_best(_equal)),
)
TOKEN_F1 = AnswerMetric(
    "token_f1",
    SHARE,
    True,
    True,
    f"F1 of the words shared with the reference, {SQUAD}",
    mean_of(_best(_token_f1)),
)
CONTAINS = AnswerMetric(
    "contains",
    SHARE,
    True,
    True,
    f"share of answers that hold the reference as whole words, {SQUAD}",
    mean_of(_contains),
)
