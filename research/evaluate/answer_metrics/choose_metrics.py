"""The metrics that there are, and those that suit the rows of a file."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from research.core.errors import UserError, look_up
from research.core.visible_text import counted
from research.evaluate.answer_metrics import (
    beyond_loss,
    label_metrics,
    rouge,
    short_answers,
    translation_metrics,
)
from research.evaluate.answer_metrics.answer_metric import AnswerMetric
from research.evaluate.answer_metrics.user_metric import user_metric
from research.evaluate.answer_metrics.words_of_text import words_of
from research.evaluate.answered_row import AnsweredRow

AUTO = "auto"
FOR_SHORT = (short_answers.EXACT_MATCH, short_answers.TOKEN_F1, short_answers.CONTAINS)
FOR_LABELS = (
    label_metrics.ACCURACY,
    label_metrics.MACRO_F1,
    label_metrics.LABEL_NAMED,
)
FOR_LONG = (rouge.ROUGE_L, rouge.ROUGE_2)
FOR_TEXT = (translation_metrics.CHRF, translation_metrics.BLEU)
FOR_ALL = (
    beyond_loss.STOPPED,
    beyond_loss.EMPTY,
    beyond_loss.LENGTH_RATIO,
    beyond_loss.REPETITION,
    beyond_loss.COPIES_PROMPT,
    beyond_loss.LANGUAGE_SWITCH,
)
METRICS: Mapping[str, AnswerMetric] = {
    metric.name: metric
    for metric in (*FOR_SHORT, *FOR_LABELS, *FOR_LONG, *FOR_TEXT, *FOR_ALL)
}
# Categories whose answers are a phrase, and those whose answers are a text (as Dolly
# and the files made after it name them).
QUESTIONS = {"closed_qa", "open_qa", "information_extraction", "qa"}
SUMMARIES = {"summarization", "summarisation", "summary"}
# A reference of at most so many words is short.
SHORT = 10


def choose_metrics(
    names: Sequence[str] | str, rows: Sequence[AnsweredRow], also: Iterable[str] = ()
) -> dict[str, AnswerMetric]:
    """The metrics of these names, in their order.

    `auto` stands for those that suit the rows, each for the rows that it suits: by
    category (as Dolly names them) and by the look of the references. A named metric is
    for all rows that have what it needs. `module:function` is a user's own. The names
    `also` are those that the caller takes besides, for the message.

    Raises:
      UserError: a name is not known, no row has the reference that a metric needs, the
        references are too many to be labels, or a user's function cannot be imported.
    """
    found: dict[str, AnswerMetric] = {}
    for name in [names] if isinstance(names, str) else names:
        if name == AUTO:
            found = _suited(rows) | found
        elif ":" in name:
            found[name] = user_metric(name)
        else:
            known = dict.fromkeys([*METRICS, *also, AUTO, "module:function"])
            look_up(known, name, "a name in --metrics")
            found[name] = look_up(METRICS, name, "a name in --metrics")
    for name, metric in found.items():
        if rows and not any(map(metric.applies, rows)):
            raise UserError(
                f"the metric {name} compares answers to references, and none of "
                f"{counted(len(rows), 'row')} has one; give the rows a response, or "
                "choose metrics that need none, such as stopped, repetition or empty"
            )
        if metric in FOR_LABELS:
            label_metrics.require_labels([row for row in rows if metric.applies(row)])
    return found


def _suited(rows: Sequence[AnsweredRow]) -> dict[str, AnswerMetric]:
    labelled = label_metrics.labelled_categories(rows)

    def is_label(row: AnsweredRow) -> bool:
        return row.category in labelled

    def is_short(row: AnsweredRow) -> bool:
        return not is_label(row) and (
            _plain(row.category) in QUESTIONS
            or (_plain(row.category) not in SUMMARIES and _has_short(row))
        )

    def is_long(row: AnsweredRow) -> bool:
        return not is_label(row) and (
            _plain(row.category) in SUMMARIES or not _has_short(row)
        )

    def is_text(row: AnsweredRow) -> bool:
        return not is_label(row)

    groups = (
        (FOR_SHORT, is_short),
        (FOR_LABELS, is_label),
        (FOR_LONG, is_long),
        (FOR_TEXT, is_text),
    )
    suited = [
        dataclasses.replace(metric, is_for=is_for)
        for metrics, is_for in groups
        for metric in metrics
    ]
    return {
        metric.name: metric
        for metric in (*suited, *FOR_ALL)
        if any(map(metric.applies, rows))
    }


def _has_short(row: AnsweredRow) -> bool:
    return any(len(words_of(reference)) <= SHORT for reference in row.references)


def _plain(category: str) -> str:
    return "_".join(category.casefold().replace("-", " ").replace("_", " ").split())
