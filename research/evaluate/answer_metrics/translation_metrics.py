"""BLEU and chrF by sacreBLEU, whose counts for each row add up to those of a corpus."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex

from research.evaluate.answer_metrics.answer_metric import POINTS, AnswerMetric
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.statistics.measured import Floats, Measured

# sacreBLEU's tokenizers: its default, and the one for text without spaces.
_SPACED, _CHINESE = "13a", "zh"
_HAN = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")


@functools.cache
def _scorer(name: str, **options: Any) -> Any:
    # Late: the import takes a second, and few commands measure.
    from sacrebleu import metrics

    return getattr(metrics, name)(**options)


def _statistics(scorer: Any, row: AnsweredRow) -> list[float]:
    # The interface that sacreBLEU's own significance tests use.
    references = [[text] for text in row.references]
    return scorer._extract_corpus_statistics([row.answer], references)[0]


def _bleu(rows: Sequence[AnsweredRow]) -> Measured:
    sums, scores = [], []
    for row in rows:
        tokenizer = _CHINESE if _HAN.search(" ".join(row.references)) else _SPACED
        scorer = _scorer("BLEU", tokenize=tokenizer, effective_order=True, force=True)
        counts = _statistics(scorer, row)
        sums.append(counts)
        scores.append(float(scorer._compute_score_from_stats(list(counts)).score))
    return Measured(tuple(scores), _matrix(sums, 10), bleu_of_sums)


def bleu_of_sums(sums: Floats) -> Floats:
    """Corpus BLEU of [..., 10] counts: lengths of answers and references, then matches
    and totals of 1 to 4 words; with sacreBLEU's smoothing `exp` of orders without a
    match. An order of which the answers have no words ends the mean (0 points).
    """
    answered, expected = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2:6], sums[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        halvings = 2.0 ** np.cumsum(matches == 0, -1)
        precisions = np.where(matches > 0, matches, 1 / halvings) / totals
        brevity = np.minimum(1 - expected / answered, 0)
        score = 100 * np.exp(brevity + np.mean(np.log(precisions), -1))
    some = (totals > 0).all(-1) & (matches > 0).any(-1)
    return np.where(some, score, 0.0)


def _chrf(rows: Sequence[AnsweredRow]) -> Measured:
    scorer = _scorer("CHRF")
    sums = [_statistics(scorer, row) for row in rows]
    scores = [float(scorer._compute_f_score(counts)) for counts in sums]
    return Measured(tuple(scores), _matrix(sums, 18), chrf_of_sums)


def chrf_of_sums(sums: Floats) -> Floats:
    """chrF2 of [..., 18] counts: for 1 to 6 characters those of the answers, of the
    references and of the matches.
    """
    counts = sums.reshape(*sums.shape[:-1], 6, 3)
    answered, expected, matched = np.moveaxis(counts, -1, 0)
    counted = (answered > 0) & (expected > 0)
    orders = np.maximum(np.sum(counted, -1), 1)
    precision = np.sum(counted * matched / np.maximum(answered, 1), -1) / orders
    recall = np.sum(counted * matched / np.maximum(expected, 1), -1) / orders
    return 100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-300)


def _matrix(sums: list[list[float]], width: int) -> Floats:
    return np.array(sums, np.float64).reshape(len(sums), width)


BLEU = AnswerMetric(
    "bleu",
    POINTS,
    True,
    True,
    "corpus BLEU of sacreBLEU (Post 2018), tokenizer 13a, or zh for a reference with "
    "Chinese or Japanese characters, smoothing exp, case kept",
    _bleu,
)
CHRF = AnswerMetric(
    "chrf",
    POINTS,
    True,
    True,
    "corpus chrF2 of sacreBLEU (Popović 2015): character 1- to 6-grams, case kept",
    _chrf,
)
