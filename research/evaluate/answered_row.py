"""A row of a test file beside the answer that a model gave to it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AnsweredRow:
    """One row with its answer, the input of `research.evaluate.answer_metrics`.

    Attributes:
      id: a stable hash of the row's content, and its number among equal rows.
      place: where the row was read, as `file:line`.
      category: the row's own, empty if it has none.
      source: the name of the file or source that the row came from.
      prompt: the text that the model read, with the template around it.
      question: the words of the user, which are the instruction.
      context: the material that the question is about, empty if there is none.
      reference: the expected answer, empty if the row has none.
      answer: the model's answer.
      new_tokens: tokens of the answer, its end token not counted.
      reference_tokens: tokens of the reference.
      stopped: the model ended the answer itself, and not at the limit of tokens.
      other_references: answers that are as good as `reference`, where a row has many.
    """

    id: str
    place: str
    category: str
    source: str
    prompt: str
    question: str
    context: str
    reference: str
    answer: str
    new_tokens: int
    reference_tokens: int
    stopped: bool
    other_references: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All expected answers, empty if the row has none."""
        given = (self.reference, *self.other_references)
        return tuple(text for text in given if text and text.strip())
