"""A conversation as ids, and which of the ids are trained.

A template is cut once into its own words and holes for the texts of the turns. Words
and texts are tokenised apart: control tokens exist only in the words, and the loss mask
follows from the part that an id came from. The ids are never searched for anything.
"""

import dataclasses
import datetime
import functools
import itertools
import json
from collections.abc import Sequence

import jinja2
import jinja2.sandbox

from research.core.errors import UserError
from research.tokenize.conversation import Record, Turn
from research.tokenize.tokenizer import Tokenizer

# Private-use characters mark the holes while a template is rendered. Only the rendered
# template is searched for them, and no text of a row is in it.
OPEN, CLOSE = "\ue0f0", "\ue0f1"

DOLLY_HEADERS = {
    "system": "",
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
}
DOLLY_INPUT = "\n\n### Input:\n"


def dolly_template(tokenizer: Tokenizer) -> str:
    """The headers that Alpaca and Dolly were trained with, as a Jinja template.

    Raises:
      UserError: the tokenizer has no token that could end an answer.
    """
    if not tokenizer.eos_token:
        raise UserError("the dolly template needs a tokenizer with an end token")
    return (
        ("{{ bos_token }}" if tokenizer.add_bos else "")
        + "{% set headers = "
        + json.dumps(DOLLY_HEADERS)
        + " %}{% for message in messages %}"
        "{{ headers[message['role']] + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{{ '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ headers['assistant'] }}{% endif %}"
    )


@dataclasses.dataclass(frozen=True)
class TemplatePart:
    """A part of a template that was cut: words of its own, or a hole for a text.

    Attributes:
      ids: of the words; empty for a hole.
      turn: index of the turn whose text fills the hole; None for words.
      trained: whether these ids count in the loss.
      lead: white space of the template that is tokenised with the turn's text.
    """

    ids: tuple[int, ...]
    turn: int | None
    trained: bool
    lead: str = ""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Ids of one record, and whether each is trained."""

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """How conversations become ids, for one tokenizer and template.

    Attributes:
      stop_ids: ids at which an answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, system: str = ""):
        self._tokenizer = tokenizer
        self._system = system
        source, self._before_context = tokenizer.chat_template, "\n\n"
        if template == "dolly":
            source, self._before_context = dolly_template(tokenizer), DOLLY_INPUT
        if not source:
            raise UserError(
                "the base model has no chat template of its own; use "
                "--config.data.template=dolly"
            )
        self._render = _JinjaTemplate(source, tokenizer)
        self._skeleton = functools.cache(self._cut)
        closing = self._skeleton(("user", "assistant"), False)[-1].ids
        self.stop_ids = frozenset({closing[-1], tokenizer.eos} - {None})

    def encode(self, record: Record, budget: int | None = None) -> Encoded | None:
        """Ids and mask; a context is shortened until they are at most `budget`.

        Returns None if no word of the context would remain.
        """
        encoded = self.encode_many([record])[0]
        if budget is None or len(encoded.ids) <= budget:
            return encoded
        return self.shorten(record, encoded, budget)

    def encode_many(self, records: Sequence[Record]) -> list[Encoded]:
        """Ids and masks of many records, tokenised on all cores."""
        texts = [self._texts(record, record.context) for record in records]
        ids = iter(self._tokenizer.encode_texts(list(itertools.chain(*texts))))
        return [
            self._assemble(record, [next(ids) for _ in of_record])
            for record, of_record in zip(records, texts, strict=True)
        ]

    def encode_prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]:
        """Ids up to the beginning of the answer to the last user turn."""
        stripped = tuple(Turn(turn.role, turn.text.strip()) for turn in turns)
        record = Record(stripped, context, "", "prompt")
        texts = self._tokenizer.encode_texts(self._texts(record, context))
        roles = tuple(turn.role for turn in self._turns(record))
        return [
            i
            for part in self._skeleton(roles, True)
            for i in (part.ids if part.turn is None else texts[part.turn])
        ]

    def shorten(self, record: Record, encoded: Encoded, budget: int) -> Encoded | None:
        """Drops the end of the context; None if no word of it would remain."""
        excess = len(encoded.ids) - budget
        context = self._tokenizer.encode_texts([record.context])[0]
        while context:
            context = context[: max(len(context) - excess, 0)]
            # A cut inside a character leaves a replacement mark at the end.
            text = self._tokenizer.decode(context, skip_control=False)
            shorter = text.rstrip("\ufffd").strip()
            if not shorter:
                return None  # The answer would rest on nothing.
            encoded = self.encode(dataclasses.replace(record, context=shorter))
            if len(encoded.ids) <= budget:
                return encoded
            excess = len(encoded.ids) - budget
        return None

    def _turns(self, record: Record) -> tuple[Turn, ...]:
        if self._system and record.turns[0].role != "system":
            return (Turn("system", self._system), *record.turns)
        return record.turns

    def _texts(self, record: Record, context: str) -> list[str]:
        """The texts that fill the holes; the context follows the first user turn."""
        turns = self._turns(record)
        skeleton = self._skeleton(tuple(turn.role for turn in turns), False)
        leads = {part.turn: part.lead for part in skeleton}
        first_user = next(i for i, turn in enumerate(turns) if turn.role == "user")
        texts = [turn.text for turn in turns]
        if context:
            # A row may contain the header of an input in its text. It then looks like
            # a row with a context, which does no harm.
            texts[first_user] += self._before_context + context
        return [leads.get(i, "") + text for i, text in enumerate(texts)]

    def _assemble(self, record: Record, texts: list[list[int]]) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        roles = tuple(turn.role for turn in self._turns(record))
        for part in self._skeleton(roles, False):
            new = part.ids if part.turn is None else texts[part.turn]
            ids.extend(new)
            trained.extend([part.trained] * len(new))
        return Encoded(ids, trained)

    def _cut(self, roles: tuple[str, ...], prompt: bool) -> list[TemplatePart]:
        """The template for these roles, as parts.

        An answer starts where the generation prompt ends, because the model will have
        to write everything from there on. The parts for training end with the end
        token of the last answer: later words are not trained and only take room.
        """
        holes = [f"{OPEN}{i}{CLOSE}" for i in range(len(roles))]
        turns = [Turn(r, hole) for r, hole in zip(roles, holes, strict=True)]
        rest = self._render(turns, prompt)
        parts: list[TemplatePart] = []
        answered = False
        for index, (turn, hole) in enumerate(zip(turns, holes, strict=True)):
            words, found, rest = rest.partition(hole)
            if not found or hole in rest:
                raise UserError(
                    f"the chat template does not write the {turn.role} message of "
                    f"{' '.join(roles)} exactly once; use --config.data.template=dolly"
                )
            if turn.role == "assistant":
                words, lead = self._split_prompt(words, turns[:index])
            else:
                bare = words.rstrip()
                words, lead = bare, words[len(bare) :]
            parts += self._words(words, answered, first=index == 0)
            answered = turn.role == "assistant"
            parts.append(TemplatePart((), index, answered, lead))
        if prompt:
            return parts + self._words(rest, answered)
        return parts + self._words(rest, answered)[:1]

    def _split_prompt(self, words: str, before: Sequence[Turn]) -> tuple[str, str]:
        """Words before an answer: the generation prompt, and the white space after."""
        if not before:
            return words, ""
        prompt = self._render(before, True).rpartition(before[-1].text)[2]
        lead = words.removeprefix(prompt)
        if not words.startswith(prompt) or lead.strip():
            raise UserError(
                "the chat template's generation prompt is not how it writes an answer; "
                "use --config.data.template=dolly"
            )
        return prompt, lead

    def _words(
        self, words: str, after_answer: bool, *, first: bool = False
    ) -> list[TemplatePart]:
        """Words as parts; after an answer, they are trained up to its end token."""
        if not words and not after_answer:
            return []
        ids = self._tokenizer.encode_template(words, first=first)
        if not after_answer:
            return [TemplatePart(tuple(ids), None, False)]
        control = self._tokenizer.control_ids
        end = next((n for n, i in enumerate(ids, 1) if i in control), None)
        if end is None:
            raise UserError(
                "the chat template writes no control token after an answer, so a "
                "model could not learn to stop; use --config.data.template=dolly"
            )
        return [
            TemplatePart(tuple(ids[:end]), None, True),
            TemplatePart(tuple(ids[end:]), None, False),
        ]


class _JinjaTemplate:
    """A chat template, run in Jinja's sandbox."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _today
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template is broken: {error}") from error
        self._names = {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
        }

    def __call__(self, turns: Sequence[Turn], prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # A template can fail in any way code can.
            roles = " ".join(turn.role for turn in turns)
            raise UserError(
                f"the chat template refuses the messages {roles}: {error}"
            ) from error


def _today(form: str) -> str:
    """A fixed day, so that the ids of a row do not depend on when it is read."""
    return datetime.date(2026, 1, 1).strftime(form)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
