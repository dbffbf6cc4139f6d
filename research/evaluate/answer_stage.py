"""The answers of an evaluation: what is checked before a model is open, and after."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.evaluate.answer_metrics.answer_metric import AnswerMetric
from research.evaluate.answer_metrics.choose_metrics import AUTO, choose_metrics
from research.evaluate.answered_row import AnsweredRow
from research.evaluate.judgement import Measurements
from research.evaluate.loss_values import CommonLosses
from research.evaluate.measuring.evaluated_models import EvaluatedModel, ModelSet
from research.evaluate.measuring.measure_choices import (
    AUTO_CHOICES,
    CHOICE_METRICS,
    choice_line,
    choice_metrics,
    choices_of,
    drop_long_choices,
    has_choices,
    score_choices,
)
from research.evaluate.measuring.measure_models import (
    AskedRows,
    measure_answers,
    plan_prompts,
)
from research.evaluate.measuring.prompt_keys import PromptKeys
from research.evaluate.multiple_choice import Choices


@dataclasses.dataclass(frozen=True)
class AnswerStage:
    """Rows with the metrics that judge their answers.

    Attributes:
      asked: the rows that every model has room for, choices included.
      metrics: of answers that a model writes.
      choice_names: metrics of choices that a model scores.
      choices: of each row, where there are such metrics.
    """

    asked: AskedRows
    metrics: Mapping[str, AnswerMetric]
    choice_names: Sequence[str]
    choices: Mapping[str, Choices]

    @classmethod
    def of(
        cls, asked: AskedRows, names: Sequence[str], found: ModelSet, data: Any
    ) -> "AnswerStage":
        """Chooses the metrics; `data` is the config of the rows.

        For rows with choices `auto` stands for metrics of these: their reference is a
        number or a letter, which no written answer is compared with.

        Raises:
          UserError: a metric is not known, or the rows lack what it needs.
        """
        names = [x for name in names for x in _suited(name, asked, data)]
        scored = [name for name in dict.fromkeys(names) if name in CHOICE_METRICS]
        written = [name for name in names if name not in CHOICE_METRICS]
        choices, metrics = {}, {}
        if scored:
            choices = choices_of(asked, data)
            asked = drop_long_choices(asked, choices, found.models)
            left = next(iter(asked.by_model.values()))
            choices = {x.row.id: choices[x.row.id] for x in left}
        if written:
            before = asked.without_answers(found.models[0])
            metrics = choose_metrics(written, before, CHOICE_METRICS)
        return cls(asked, metrics, scored, choices)

    def prompts(
        self, models: Sequence[EvaluatedModel], folder: Path, slots: int
    ) -> PromptKeys:
        """The prompts that the pass over whole rows reads, see `plan_prompts`."""
        if not self.metrics:
            return PromptKeys({})
        return plan_prompts(self.asked, models, folder, slots)

    def measure(
        self,
        found: ModelSet,
        losses: CommonLosses,
        folder: Path,
        slots: int,
        prompts: PromptKeys,
    ) -> Measurements:
        """Gets the answers of all models where a metric reads them, and compares.

        Raises:
          UserError, SaveError: see `ask_models`.
        """
        models = found.models
        by_model = {x.name: dict(self.metrics) for x in models}
        if self.metrics:
            rows = measure_answers(self.asked, models, folder, slots, prompts)
        else:
            rows = {x.name: self.asked.without_answers(x) for x in models}
        said = {
            name: [_written(row) if self.metrics else {} for row in own]
            for name, own in rows.items()
        }
        if self.choices:
            scored = score_choices(self.asked, self.choices, models, folder, slots)
            for name, own in by_model.items():
                own |= choice_metrics(self.choice_names, scored[name])
                for row, line in zip(rows[name], said[name], strict=True):
                    line |= choice_line(self.choice_names, scored[name][row.id])
        return Measurements.of(rows, losses, by_model, said)


def _written(row: AnsweredRow) -> dict[str, Any]:
    return {
        "answer": row.answer,
        "new_tokens": row.new_tokens,
        "stopped": row.stopped,
    }


def _suited(name: str, asked: AskedRows, data: Any) -> list[str]:
    return [*AUTO_CHOICES] if name == AUTO and has_choices(asked, data) else [name]
