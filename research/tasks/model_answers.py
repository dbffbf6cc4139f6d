"""Text that a model wrote during or after training, as data."""

import dataclasses


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
