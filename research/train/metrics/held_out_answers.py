"""Answers to held-out rows, in training and at its end, and what they are worth."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.checkpoints.checkpoint_listing import LOSS
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.visible_text import counted
from research.engine.answers.full_answer import FullAnswer
from research.engine.text_generation import TextGenerator
from research.evaluate.answer_metrics.answer_metric import AnswerMetric
from research.evaluate.answer_metrics.choose_metrics import AUTO, choose_metrics
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.measuring.evaluated_rows import (
    AskedRow,
    choose_rows,
    pair_answer,
)
from research.evaluate.statistics.measured import Measured
from research.evaluate.statistics.paired import compare_runs
from research.evaluate.statistics.row_clusters import clusters_of
from research.tasks.model_answers import AnswerMeasure, ComparedAnswer
from research.tasks.task_protocol import Task
from research.tokenize.tokenizer import Tokenizer

TUNED = "tuned"
SHOWN = 4  # rows that were not asked, in a sentence; answers.json has all


@dataclasses.dataclass(frozen=True)
class JudgedAnswers:
    """The answers of one model, and what they are worth.

    Attributes:
      step: updates that the model has had.
      rows: the rows with their answers.
      measured: the results by metric; a metric that failed is missing.
      problems: a sentence on each metric that failed, as a user's function may.
    """

    step: int
    rows: Sequence[AnsweredRow]
    measured: Mapping[str, Measured]
    problems: Sequence[str] = ()


def check_best_by(config: Config) -> None:
    """Refuses a `checkpoint.best_by` that could rank no step, before anything is read.

    Raises:
      UserError: there is no such metric, none of its values is better than another, or
        no answers are measured in training.
    """
    name = config.checkpoint.best_by
    if name == LOSS:
        return
    flag = f"config.checkpoint.best_by={name}"
    if name == AUTO:
        raise UserError(f"{flag} stands for several metrics: name one")
    if choose_metrics([name], ())[name].higher_is_better is None:
        raise UserError(
            f"{flag}: neither a high nor a low value of it is better, so it can rank "
            "no step: choose another metric, or loss"
        )
    if not (config.eval.answers_every and config.eval.answers_rows):
        raise UserError(
            f"{flag} needs answers during training: set config.eval.answers_every, "
            "e.g. to 50, and config.eval.answers_rows above 0"
        )


def count_not_asked(rows: Sequence[str]) -> str:
    """`1 held-out row (f.jsonl:7: reason)`, and so many more."""
    more = len(rows) - SHOWN
    named = [*rows[:SHOWN], *[f"and {more:,} more in answers.json"] * (more > 0)]
    return f"{counted(len(rows), 'held-out row')} ({'; '.join(named)})"


class HeldOutAnswers:
    """The same held-out rows for every step, in the order in which a task gives them.

    Attributes:
      rows: as a model is asked them.
      not_asked: `file:line: reason` for each held-out row that cannot be asked.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        config: Config,
        sign_of_life: Callable[[], None] = lambda: None,
    ):
        """The rows of a task; `sign_of_life` is called after each answer.

        Raises:
          UserError: no answer could be judged by `checkpoint.best_by`.
        """
        self._prompts, self._tokenizer = task.asked(), tokenizer
        self._sign_of_life = sign_of_life
        self._base: JudgedAnswers | None = None
        self._shown, self._best_by = config.eval.prompts, config.checkpoint.best_by
        self.not_asked = task.not_asked()
        if self.not_asked:
            logging.warning("not asked: %s", count_not_asked(self.not_asked))
        records = [prompt.record for prompt in self._prompts]
        chosen = choose_rows(records, task.groups) if records else []
        self.rows = [
            AskedRow(row, prompt.request)
            for row, prompt in zip(chosen, self._prompts, strict=True)
        ]
        self._count = min(config.eval.answers_rows, len(self.rows))
        if self._best_by != LOSS and not self._count:
            raise UserError(
                f"config.checkpoint.best_by={self._best_by} judges answers, and there "
                "is no held-out row that can be answered: raise config.data.held_out, "
                "or judge by loss"
            )

    @functools.cached_property
    def metrics(self) -> dict[str, AnswerMetric]:
        """Those that suit the rows, and the one that ranks steps."""
        own = [self._best_by] if self._best_by != LOSS else []
        rows = [pair_answer(row, self._tokenizer) for row in self._judged(self.rows)]
        return choose_metrics([AUTO, *own], rows) if rows else {}

    def answer(self, step: int, model: TextGenerator) -> JudgedAnswers:
        """The answers of a model after `step` updates. All processes call it."""
        answers = model.in_order([row.request for row in self.rows])
        rows = []
        for row, answer in zip(self.rows, answers, strict=True):
            rows.append(pair_answer(row, self._tokenizer, FullAnswer.of(answer)))
            self._sign_of_life()
        measured, problems = {}, []
        for name, metric in self.metrics.items():
            try:
                measured[name] = metric.measure(self._judged(rows))
            except UserError as error:  # It costs its value, and nothing of the run.
                problems.append(f"{error} (after step {step}: {name} has no value)")
        return JudgedAnswers(step, rows, measured, problems)

    def values(self, found: JudgedAnswers) -> dict[str, float | None]:
        """By metric; None where it failed or applies to no row."""
        known = found.measured
        return {k: known[k].value if k in known else None for k in self.metrics}

    def cost(self, found: JudgedAnswers) -> float | None:
        """The value by which steps are ranked, the lower the better; None without."""
        if self._best_by == LOSS:
            return None
        value = self.values(found)[self._best_by]
        sign = -1 if self.metrics[self._best_by].higher_is_better else 1
        return None if value is None else sign * value + 0.0  # Never -0.0.

    def answer_base(
        self, open_base: Callable[[], TextGenerator | None]
    ) -> JudgedAnswers | None:
        """The answers of the base model; it is opened once for runs that share it."""
        if self._base is None and self.rows and (model := open_base()):
            self._base = self.answer(0, model)
        return self._base

    def side_by_side(
        self, base: JudgedAnswers | None, tuned: JudgedAnswers
    ) -> list[ComparedAnswer]:
        """The first `eval.prompts` rows, answered by both models."""
        before = base.rows if base else [None] * len(tuned.rows)
        return [
            ComparedAnswer(
                group=row.category,
                where=row.place,
                prompt=prompt.text,
                base=old.answer if old else "",
                tuned=row.answer,
                reference=row.reference,
            )
            for prompt, old, row in zip(self._prompts, before, tuned.rows, strict=True)
        ][: self._shown]

    def compare(
        self, base: JudgedAnswers | None, tuned: JudgedAnswers
    ) -> list[AnswerMeasure]:
        """Every metric of both models, with the interval of their difference."""
        rows, judged = self._judged(tuned.rows), {}
        before, after = self.values(base) if base else {}, self.values(tuned)
        if base and self.metrics:
            judged = compare_runs(
                base.measured,
                {TUNED: tuned.measured},
                clusters_of(rows),
                {k: metric.higher_is_better for k, metric in self.metrics.items()},
            )[TUNED]

        def difference(name: str) -> dict[str, Any]:
            if name not in judged:
                return {}
            found = judged[name].comparison
            words = judged[name].verdict
            return {"low": found.low, "high": found.high, "verdict": words}

        return [
            AnswerMeasure(
                name=name,
                unit=metric.unit,
                rows=sum(map(metric.applies, rows)),
                base=before.get(name),
                tuned=after[name],
                **difference(name),
            )
            for name, metric in self.metrics.items()
        ]

    def _judged(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Those that metrics judge; others are only shown."""
        return rows[: self._count]
