"""Properties of answers that a loss cannot see, with no need for a right answer."""

import functools
from collections import Counter
from collections.abc import Sequence

import regex
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from research.evaluate.answer_metrics.answer_metric import (
    RATIO,
    SHARE,
    AnswerMetric,
    mean_of,
)
from research.evaluate.answer_metrics.words_of_text import (
    grams,
    words_and_signs_of,
    words_of,
)
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.statistics import measured
from research.evaluate.statistics.measured import Measured

REPEATED = 4
COPIED = 8
# Below this confidence, or in a shorter text, a language is not known. A character of
# these scripts is a syllable or a word: fewer of them are as long as so many letters.
CONFIDENCE, LETTERS, SYLLABLES = 0.8, 20, 8
# Names and lists spread over many languages, a sentence over one or two near ones.
TOP_TWO = 0.9
_SYLLABLE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
# Variants of a language share its probability, so that none of them alone is sure.
VARIANT_OF = {
    **{"wuu": "zh", "yue": "zh", "nn": "no", "pcm": "en", "ary": "ar", "arz": "ar"},
    **{"bs": "hr", "sr": "hr", "ms": "id", "uzs": "uz"},
}
NO_LANGUAGE = "zxx"  # ISO 639, for numbers and signs


def _length_ratio(rows: Sequence[AnsweredRow]) -> Measured:
    return measured.ratio(
        [row.new_tokens for row in rows], [row.reference_tokens for row in rows]
    )


def repetition(text: str) -> float:
    """The share of 4-grams of words and signs that are there already; 0 without any.

    seq-rep-4 of Welleck et al. 2020, "Neural text generation with unlikelihood
    training", over words in place of tokens, so that models with different tokenizers
    compare.
    """
    runs = list(grams(words_and_signs_of(text), REPEATED))
    return (len(runs) - len(set(runs))) / max(len(runs), 1)


def copied(row: AnsweredRow) -> float:
    """The share of the answer's words in copied runs of at least 8 words.

    Runs that a reference has, too, do not count: an extract should copy. (Coverage by
    fragments: Grusky et al. 2018, "Newsroom", with a least length.)
    """
    answer = words_of(row.answer)
    material = _runs("\n".join((row.prompt, row.question, row.context)))
    wanted = set().union(*map(_runs, row.references)) if row.references else set()
    inside = [False] * len(answer)
    for start, run in enumerate(grams(answer, COPIED)):
        if run in material and run not in wanted:
            inside[start : start + COPIED] = [True] * COPIED
    return sum(inside) / max(len(answer), 1)


def _runs(text: str) -> set[tuple[str, ...]]:
    return set(grams(words_of(text), COPIED))


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.lru_cache(maxsize=4096)
def languages_of(text: str) -> Counter[str]:
    """The probability of each language (ISO 639); empty if the text is short."""
    syllables = len(_SYLLABLE.findall(text))
    letters = sum(map(str.isalpha, text)) - syllables
    if letters / LETTERS + syllables / SYLLABLES < 1:
        return Counter()
    found: Counter[str] = Counter()
    for language, probability in _identifier().rank(text):
        found[VARIANT_OF.get(language, language)] += float(probability)
    return found


def _language_switch(row: AnsweredRow) -> float | None:
    """Whether the answer is in one or two other languages; None where it is open."""
    wanted, found = map(languages_of, (row.reference or row.question, row.answer))
    expected, actual = (max(x, key=x.get, default=NO_LANGUAGE) for x in (wanted, found))
    if NO_LANGUAGE in (expected, actual) or wanted[expected] < CONFIDENCE:
        return None
    if found[expected] >= CONFIDENCE:
        return 0.0
    clear = sum(probability for _, probability in found.most_common(2)) >= TOP_TWO
    return 1.0 if clear and found[expected] <= 1 - CONFIDENCE else None


STOPPED = AnswerMetric(
    "stopped",
    SHARE,
    True,
    False,
    "share of answers that the model ended itself, before the limit of tokens",
    mean_of(lambda row: float(row.stopped)),
)
EMPTY = AnswerMetric(
    "empty",
    SHARE,
    False,
    False,
    "share of answers without a visible character",
    mean_of(lambda row: float(not words_and_signs_of(row.answer))),
)
LENGTH_RATIO = AnswerMetric(
    "length_ratio",
    RATIO,
    None,
    True,
    "tokens of all answers divided by tokens of their references",
    _length_ratio,
)
REPETITION = AnswerMetric(
    "repetition",
    SHARE,
    False,
    False,
    "share of an answer's 4-grams of words that it has already (Welleck et al. 2020)",
    mean_of(lambda row: repetition(row.answer)),
)
COPIES_PROMPT = AnswerMetric(
    "copied",
    SHARE,
    False,
    False,
    "share of an answer's words in runs of 8 or more that the prompt has and the "
    "reference does not",
    mean_of(copied),
)
LANGUAGE_SWITCH = AnswerMetric(
    "language_switch",
    SHARE,
    False,
    False,
    "share of answers in another language than the reference, or the question where "
    "there is none; where py3langid is sure of the one, and that it is not the other",
    mean_of(_language_switch),
)
