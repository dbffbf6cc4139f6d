"""Text that a model wrote during or after training, as data."""

import dataclasses

from research.engine.requests import Request
from research.tokenize.conversation import Record


@dataclasses.dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out row that a model is asked.

    Attributes:
      record: the row.
      text: all turns before the answer, with the row's context.
      request: for the answer by the likeliest tokens.
    """

    record: Record
    text: str
    request: Request


def lack_of_room(prompt: int, context: int, answer: int = 1) -> str:
    """Why a prompt and an answer do not fit a context, in tokens; "" if they do."""
    if prompt + answer <= context:
        return ""
    why = f"the prompt has {prompt} tokens, and the model's context is {context}"
    if prompt >= context:
        return why
    return f"{why}: {context - prompt} are left, and an answer may have {answer}"


@dataclasses.dataclass(frozen=True)
class ComparedAnswer:
    """One held-out prompt, and what each model answers to it.

    `dataclasses.asdict` gives an entry of `answers` in `answers.json`.

    Attributes:
      group: the prompt's category; may be empty.
      where: the row that the prompt comes from, such as `rows.jsonl:7`.
      prompt: all turns before the answer, with the row's context.
      base: the answer of the model that training began from.
      tuned: the answer of the trained model.
      reference: the answer that the row gives.
    """

    group: str
    where: str
    prompt: str
    base: str
    tuned: str
    reference: str


@dataclasses.dataclass(frozen=True)
class AnswerMeasure:
    """A metric of the answers to held-out rows, of the base model and the tuned one.

    `dataclasses.asdict` gives an entry of `metrics` in `answers.json`.

    Attributes:
      name: of the metric.
      unit: of its values.
      rows: how many it applies to.
      base, tuned: its values; None where it applies to no row, or there is no base.
      low, high: 95 % interval of their difference.
      verdict: in words; empty without a base model.
    """

    name: str
    unit: str
    rows: int
    base: float | None
    tuned: float | None
    low: float | None = None
    high: float | None = None
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """How the model continues a prompt after some step.

    `dataclasses.asdict` gives a line of `samples.jsonl`.

    Attributes:
      step: updates that the model has had.
      prompt: the text that it was given.
      text: the text that it added.
    """

    step: int
    prompt: str
    text: str
