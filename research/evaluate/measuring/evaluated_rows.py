"""The rows of an evaluation, and the requests that ask for their answers."""

import collections
import dataclasses
import hashlib
import heapq
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

from research.core.errors import UserError
from research.data.instructions.instruction_dataset import OTHERS
from research.data.instructions.row_cache import place_of
from research.data.instructions.row_selection import content_key
from research.engine.answers.full_answer import FullAnswer
from research.engine.requests import Request, Sampling
from research.evaluate.answered_row import AnsweredRow
from research.tasks.model_answers import lack_of_room
from research.tasks.task_protocol import EvaluationRows, PromptFormat
from research.tokenize.conversation import Record
from research.tokenize.tokenizer import Tokenizer

ID_DIGITS = 16
NO_ANSWER = FullAnswer("", "", 0)


@dataclasses.dataclass(frozen=True)
class EvaluatedRow:
    """A row with its answer.

    Attributes:
      id: a hash of its texts, and its number among equal rows.
      record: the row.
    """

    id: str
    record: Record

    @property
    def place(self) -> str:
        """`file:line`."""
        return self.record.where

    @property
    def source(self) -> str:
        """The file, or the dataset."""
        return self.place.rpartition(":")[0]

    @property
    def answer_bytes(self) -> int:
        """UTF-8 bytes of the answers that count in a loss."""
        turns = self.record.turns
        answers = [x.said for x in turns if x.role == "assistant" and x.trained]
        return sum(len(text.encode()) for text in answers)


@dataclasses.dataclass(frozen=True)
class AskedRow:
    """A row as one model is asked it.

    Attributes:
      row: the row.
      request: for its answer; None where it cannot be asked.
      problem: why it cannot.
    """

    row: EvaluatedRow
    request: Request | None
    problem: str = ""


class RowsRead:
    """Counts rows while they are read: those that can be evaluated, and the others."""

    def __init__(self, rows: EvaluationRows):
        self._rows, self._usable = rows, 0
        self._dropped = {place_of(line) for line in rows.left_out}

    def records(self) -> Iterator[Record]:
        """The rows that can be evaluated; to be read once, before the counts."""
        for record in self._rows.records():
            self._usable += 1
            self._dropped.discard(record.where)
            yield record

    def values(self) -> dict[str, int]:
        """How many rows were read, and how many of them were dropped."""
        dropped = len(self._dropped)
        return {"read": self._usable + dropped, "dropped": dropped}

    def lines_on(self, chosen: Iterable[EvaluatedRow]) -> list[str]:
        """The lines on rows that were dropped, and on those that were chosen."""
        places = self._dropped | {row.place for row in chosen}
        return [line for line in self._rows.left_out if place_of(line) in places]


def choose_rows(
    records: Iterable[Record], groups: Collection[str], count: int = 0
) -> list[EvaluatedRow]:
    """Up to `count` of the rows, in their order; 0 takes all.

    A hash of its texts decides whether a row is taken, so the first hundred are among
    the first thousand, and in whatever order the file has them.

    A category that is none of `groups` is rare, and becomes one with the others.

    Raises:
      UserError: there is no row.
    """
    seen: collections.Counter[str] = collections.Counter()

    def numbered() -> Iterator[tuple[bytes, int, EvaluatedRow]]:
        for number, record in enumerate(records):
            key = content_key(record).hex()[:ID_DIGITS]
            seen[key] += 1
            if record.category not in groups:
                record = dataclasses.replace(record, category=OTHERS)
            name = f"{key}-{seen[key]}"
            # The split of a run orders rows by the key itself: another order is needed.
            order = hashlib.sha256(name.encode()).digest()
            yield order, number, EvaluatedRow(name, record)

    every = numbered()
    chosen = heapq.nsmallest(count, every) if count else [*every]
    if not chosen:
        raise UserError("there is no row to evaluate; name rows with --data=FILE")
    if len(chosen) < count:
        logging.warning(
            "--rows=%d, and there are %d: all are evaluated", count, len(chosen)
        )
    return [row for _, _, row in sorted(chosen, key=lambda found: found[1])]


def ask_rows(
    rows: Sequence[EvaluatedRow],
    prompts: PromptFormat,
    sampling: Sampling,
    longest: int,
    stop: tuple[str, ...] = (),
) -> list[AskedRow]:
    """The request for each row's answer: all its turns but the last one are the prompt.

    Args:
      rows: any.
      prompts: how they become ids, as in training.
      sampling: its limit of tokens is lowered where the context has less room. Draws
        depend on its seed and on the row, and not on the model.
      longest: the context of the model.
      stop: texts that end an answer.
    """
    return [_ask(row, prompts, sampling, longest, stop) for row in rows]


def _ask(
    row: EvaluatedRow,
    prompts: PromptFormat,
    sampling: Sampling,
    longest: int,
    stop: tuple[str, ...],
) -> AskedRow:
    record = row.record
    try:
        ids = prompts.encode_prompt(record.turns[:-1], record.context)
    except UserError as error:
        return AskedRow(row, None, str(error))
    if why := lack_of_room(len(ids), longest):
        return AskedRow(row, None, why)
    digest = hashlib.sha256(f"{sampling.seed} {row.id}".encode()).digest()
    own = dataclasses.replace(
        sampling,
        max_new_tokens=min(sampling.max_new_tokens, longest - len(ids)),
        seed=int.from_bytes(digest[:4]) >> 1,
    )
    return AskedRow(row, Request(tuple(ids), own, prompts.stop_ids, stop))


def pair_answer(
    asked: AskedRow, tokenizer: Tokenizer, answer: FullAnswer = NO_ANSWER
) -> AnsweredRow:
    """The row beside an answer, as metrics read it."""
    record, request = asked.row.record, asked.request
    reference = record.turns[-1].said
    question = next(x for x in reversed(record.turns[:-1]) if x.role != "assistant")
    # A text of --stop ends an answer that the model itself would have continued.
    stopped = answer.finish == "stop" and answer.last in request.stop_ids
    [reference_ids] = tokenizer.encode_texts([reference])
    others = tuple(text for text in record.other_answers if text != reference)
    return AnsweredRow(
        id=asked.row.id,
        place=asked.row.place,
        category=record.category,
        source=asked.row.source,
        prompt=tokenizer.decode(request.prompt, skip_control=False),
        question=question.said,
        context=record.context,
        reference=reference,
        answer=answer.text.strip(),
        new_tokens=max(0, answer.tokens - stopped),
        reference_tokens=len(reference_ids),
        stopped=stopped,
        other_references=others,
    )
