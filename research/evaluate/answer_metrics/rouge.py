"""ROUGE-L and ROUGE-2 for texts of any script.

The package `rouge-score` has had no release since 2022, drops every letter outside
ASCII and installs NLTK for a stemmer. The two measures are a count and a recursion, so
they are here; a test holds results of that package.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from research.evaluate.answer_metrics.answer_metric import SHARE, AnswerMetric, mean_of
from research.evaluate.answer_metrics.words_of_text import grams, words_of
from research.evaluate.answered_row import AnsweredRow

Overlap = Callable[[Sequence[str], Sequence[str]], float]


def common_subsequence(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of one integer.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited": a word of `two` costs
    a few operations on len(one) bits, so that answers of 100,000 words take seconds.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    open_places = full
    for word in two:
        matched = open_places & places.get(word, 0)
        open_places = (open_places + matched | open_places - matched) & full
    return len(one) - open_places.bit_count()


def _rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    shared = common_subsequence(reference, answer)
    return 2 * shared / (len(answer) + len(reference))


def _rouge_2(answer: Sequence[str], reference: Sequence[str]) -> float:
    one, two = Counter(grams(answer, 2)), Counter(grams(reference, 2))
    return 2 * (one & two).total() / max(one.total() + two.total(), 1)


def _best(overlap: Overlap, fewest: int) -> Callable[[AnsweredRow], float | None]:
    """The best over references of at least `fewest` words; None without any."""

    def best(row: AnsweredRow) -> float | None:
        answer = words_of(row.answer)
        references = [words_of(reference) for reference in row.references]
        scores = [overlap(answer, each) for each in references if len(each) >= fewest]
        return max(scores, default=None)

    return best


SOURCE = "F1 (Lin 2004), words without case or stemming, best of all references"
ROUGE_L = AnswerMetric(
    "rouge_l",
    SHARE,
    True,
    True,
    f"longest common subsequence with the reference, {SOURCE}",
    mean_of(_best(_rouge_l, 1)),
)
ROUGE_2 = AnswerMetric(
    "rouge_2",
    SHARE,
    True,
    True,
    f"pairs of neighbouring words shared with the reference, {SOURCE}",
    mean_of(_best(_rouge_2, 2)),
)
