"""Rows with choices: which of them each model finds likeliest."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.data.instructions.row_selection import find_rows
from research.data.row_readers import BadRowError
from research.engine.requests import Piece, Request, Sampling
from research.evaluate.answer_metrics.answer_metric import SHARE, AnswerMetric
from research.evaluate.measuring.evaluated_models import EvaluatedModel
from research.evaluate.measuring.evaluated_rows import AskedRow
from research.evaluate.measuring.measure_models import AskedRows, ask_kept
from research.evaluate.multiple_choice import (
    NORMALISATIONS,
    Choices,
    ScoredChoices,
    chosen,
    measure_choices,
    read_choices,
)

# The names of these metrics, and how each divides log-probabilities.
CHOICE_METRICS = {f"choice_{name}": name for name in NORMALISATIONS}
# Those of `auto`: acc and acc_norm of lm-evaluation-harness.
AUTO_CHOICES = ("choice_none", "choice_bytes")


def choices_of(asked: AskedRows, data_config: Any) -> dict[str, Choices]:
    """The choices of each row by its id.

    Args:
      asked: the rows.
      data_config: how they are read; its `path` leads to them.

    Raises:
      UserError: a row has none, or its right choice is not among them.
    """
    found = {
        row_id: read_choices(row, place)
        for row_id, place, row in _read_again(asked, data_config)
    }
    if missing := len(next(iter(asked.by_model.values()))) - len(found):
        raise UserError(f"the choices of {missing} rows cannot be read again")
    return found


def has_choices(asked: AskedRows, data_config: Any) -> bool:
    """Whether every row has choices and the right one, as `read_choices` reads them."""
    count = 0
    for _, place, row in _read_again(asked, data_config):
        try:
            read_choices(row, place)
        except UserError as error:
            if count:
                logging.warning(
                    "the first %d rows have choices, but %s; written answers are "
                    "measured, unless --metrics names choice_none or choice_bytes",
                    *(count, error),
                )
            return False
        count += 1
    return count > 0


def _read_again(
    asked: AskedRows, data_config: Any
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Rows with all their columns: the id, the place and the row."""
    rows = next(iter(asked.by_model.values()))
    wanted = {x.row.place.removeprefix("eval_path "): x.row.id for x in rows}
    for place, row in find_rows(data_config).read():
        if place in wanted and not isinstance(row, BadRowError):
            yield wanted[place], place, row


def drop_long_choices(
    asked: AskedRows,
    choices: Mapping[str, Choices],
    models: Sequence[EvaluatedModel],
) -> AskedRows:
    """The rows of which every model can read each choice after the prompt.

    Raises:
      UserError: there is no such row.
    """
    problems: dict[str, str] = {}
    for model in models:
        longest = model.run.base.architecture.max_position
        for x, number, ids in _continuations(asked, choices, model):
            if len(x.request.prompt) + len(ids) > longest:
                problems.setdefault(
                    x.row.id,
                    f"{x.row.place}: choice {number} has {len(ids)} tokens, its prompt "
                    f"{len(x.request.prompt)}, and the model's context is {longest}",
                )
    return asked.without(problems)


def score_choices(
    asked: AskedRows,
    choices: Mapping[str, Choices],
    models: Sequence[EvaluatedModel],
    folder: Path,
    slots: int,
) -> dict[str, dict[str, ScoredChoices]]:
    """The log-probability of each choice after the row's prompt, by model and row.

    Raises:
      UserError, SaveError: see `ask_models`.
    """
    requests = {
        model.name: {
            f"{x.row.id} {number}": Request(
                (*x.request.prompt, *ids),
                Sampling(max_new_tokens=0),
                top_logprobs=0,
                echo=True,
                echo_from=len(x.request.prompt),
            )
            for x, number, ids in _continuations(asked, choices, model)
        }
        for model in models
    }
    found = ask_kept("choices", requests, models, folder, slots, _score)
    return {
        model.name: {
            row: _together(each, model.name, row, found)
            for row, each in choices.items()
        }
        for model in models
    }


def _continuations(
    asked: AskedRows, choices: Mapping[str, Choices], model: EvaluatedModel
) -> Iterator[tuple[AskedRow, int, Sequence[int]]]:
    """Each row as the model is asked it, the number of a choice, and its ids."""
    for x in asked.by_model[model.name]:
        texts = [*choices[x.row.id].texts]
        for number, ids in enumerate(model.run.base.tokenizer.encode_texts(texts)):
            yield x, number, ids


def choice_metrics(
    names: Sequence[str], scored: Mapping[str, ScoredChoices]
) -> dict[str, AnswerMetric]:
    """The metrics of one model, which has `scored` the choices of each row."""
    return {name: _metric(name, scored) for name in names}


def choice_line(names: Sequence[str], scored: ScoredChoices) -> dict[str, Any]:
    """The choices a model made, by metric, for `rows.jsonl`; -inf is null there."""
    return {
        "log_probabilities": [
            x if math.isfinite(x) else None for x in scored.log_probabilities
        ],
        "chosen": {name: chosen(scored, CHOICE_METRICS[name]) for name in names},
    }


def _metric(name: str, scored: Mapping[str, ScoredChoices]) -> AnswerMetric:
    divisor = CHOICE_METRICS[name]
    by = "" if divisor == "none" else f" divided by its {divisor}"
    return AnswerMetric(
        name=name,
        unit=SHARE,
        higher_is_better=True,
        needs_reference=True,
        note=f"the right choice has the highest log-probability{by}",
        measure_rows=lambda rows: measure_choices(
            [scored[row.id] for row in rows], divisor
        ),
    )


def _score(pieces: list[Piece]) -> dict[str, Any]:
    scores = pieces[0].prompt_logprobs
    return {"logprob": sum(x.logprob for x in scores), "tokens": len(scores)}


def _together(
    choices: Choices, model: str, row: str, found: Mapping[Any, Mapping[str, Any]]
) -> ScoredChoices:
    each = [found[model, f"{row} {i}"] for i in range(len(choices.texts))]
    return ScoredChoices(
        choices,
        tuple(x["logprob"] for x in each),
        tuple(x["tokens"] for x in each),
    )
