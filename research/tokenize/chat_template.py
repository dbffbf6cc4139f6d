"""A conversation as ids, and which of the ids are trained.

`template_cut` cuts a template once for each form of conversation. The texts of rows
fill its holes; the ids are never searched for anything.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError, look_up, nearest
from research.tokenize.conversation import CALLS, Record, Turn, template_variables
from research.tokenize.templates.template_cut import Part, cut_conversation, cut_prompt
from research.tokenize.templates.template_holes import TextHider
from research.tokenize.templates.template_process import render_template
from research.tokenize.templates.template_tools import (
    ASKED,
    check_fields,
    quoted,
    quotes_results,
)
from research.tokenize.tokenizer import Before, Tokenizer

MOST_CUTS = 4096  # forms of conversations that are remembered
# A text with letters that filters change.
PROBE = "Aé <b> & \"q\" 'x' \\ {y}\n\n\tz  10 %"
OWN_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents")
LITERALS = {"True": "true", "False": "false", "None": "null"}

DOLLY_HEADERS = {
    "system": "",
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
    "tool": "### Tool:\n",
}
DOLLY_INPUT = "\n\n### Input:\n"


def written_template(name: str, tokenizer: Tokenizer) -> str:
    """The template that `config.data.template` names; empty if the model has none.

    Raises:
      UserError: there is no such name.
    """
    known = {"chat": lambda: tokenizer.chat_template}
    known["dolly"] = lambda: dolly_template(tokenizer)
    return look_up(known, name, "config.data.template")()


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
class Encoded:
    """Ids of one record, and whether each is trained."""

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """How conversations become ids, for one tokenizer and template.

    Attributes:
      stop_ids: ids at which an answer ends.
      notes: what the template does that a user should know, in sentences.
      fingerprint: sha256 over all that decides which ids a conversation becomes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        system: str = "",
        written_args: Sequence[str] = (),
    ):
        """Runs the template once.

        Args:
          tokenizer: of the model, with its own template.
          template: `chat` or `dolly`.
          system: the system text of conversations without one of their own.
          written_args: variables of the template, as `name=value`.

        Raises:
          UserError: the template cannot be used, or has no such variable.
        """
        self._tokenizer = tokenizer
        self._system = system
        self._source = written_template(template, tokenizer)
        self._before_context = DOLLY_INPUT if template == "dolly" else "\n\n"
        if not self._source:
            raise UserError(
                "the base model has no chat template of its own; use "
                "--config.data.template=dolly"
            )
        self._values = {
            "tools": None,
            "documents": None,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            **read_template_args(self._source, written_args),
        }
        self._hider = TextHider(self._source, tokenizer)
        self._cut = functools.lru_cache(MOST_CUTS)(self._cut_turns)
        self._cut_prompt = functools.lru_cache(MOST_CUTS)(self._cut_prompt_turns)
        self.notes: list[str] = []
        shortest = Record((Turn("user", "q"), Turn("assistant", "a")), "", "", "a chat")
        closing = self.encode_many([shortest])[0].ids[-1]
        self._check_texts()
        parts = (
            tokenizer.fingerprint, sorted(tokenizer.control_ids), self._source,
            self._before_context, system, sorted(self._values.items(), key=repr),
        )  # fmt: skip
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        self.stop_ids = frozenset({closing, *tokenizer.end_ids})

    def encode(self, record: Record, budget: int | None = None) -> Encoded | None:
        """Ids and mask; a context is shortened until they are at most `budget`.

        Returns None if no word of the context would remain.

        Raises:
          UserError: the template refuses the conversation.
        """
        encoded = self.encode_many([record])[0]
        if budget is None or len(encoded.ids) <= budget:
            return encoded
        return self.shorten(record, encoded, budget)

    def encode_many(self, records: Sequence[Record]) -> list[Encoded]:
        """Ids and masks of many records, tokenised on all cores.

        Raises:
          UserError: the template refuses a conversation; names its file and line.
        """
        encoded = []
        for record, each in zip(records, self.encode_each(records), strict=True):
            if isinstance(each, UserError):
                raise UserError(f"{record.where}: {each}") from each
            encoded.append(each)
        return encoded

    def encode_each(self, records: Sequence[Record]) -> list[Encoded | UserError]:
        """As `encode_many`, with an error in place of what the template refuses."""
        cuts: list[tuple[Sequence[Part], Mapping[str, str]]] = []
        refused: dict[int, UserError] = {}
        for number, record in enumerate(records):
            try:
                turns, texts = self._hide(record.turns, record.context)
                cuts.append((self._cut(turns), texts))
            except UserError as error:
                cuts.append(((), {}))
                refused[number] = error
        encoded = [
            Encoded(
                [i for ids in of_parts for i in ids],
                [
                    part.trained
                    for part, ids in zip(parts, of_parts, strict=True)
                    for _ in ids
                ],
            )
            for (parts, _), of_parts in zip(cuts, self._fill(cuts), strict=True)
        ]
        return [refused.get(number, each) for number, each in enumerate(encoded)]

    def encode_prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]:
        """Ids up to the beginning of the answer to the last user turn.

        Raises:
          UserError: the template refuses the conversation.
        """
        hidden, texts = self._hide(turns, context)
        (of_parts,) = self._fill([(self._cut_prompt(hidden), texts)])
        return [i for ids in of_parts for i in ids]

    def encode_text(self, text: str, with_start: bool = True) -> list[int]:
        """Ids of a text outside any conversation, in which all tokens are letters.

        `with_start` puts the model's mark before it, if texts of the model have one.
        """
        [ids] = self._tokenizer.encode_texts([text])
        starts = with_start and self._tokenizer.add_bos
        return [self._tokenizer.bos, *ids] if starts else ids

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

    def _check_texts(self) -> None:
        """Raises UserError if the template changes texts, other than at their ends."""
        turns = (Turn("user", f"{PROBE}?"), Turn("assistant", f"{PROBE}."))
        hidden, texts = self._hider.hide(turns)
        written = self._render(hidden, False)
        for hole, text in texts.items():
            written = written.replace(hole, text)
        if written != self._render(turns, False):
            raise UserError(
                "the chat template changes the texts of messages, as with a filter, so "
                "they cannot be kept apart from its own words; use "
                "--config.data.template=dolly"
            )

    def _hide(
        self, turns: Sequence[Turn], context: str
    ) -> tuple[tuple[Turn, ...], dict[str, str]]:
        """The turns with holes, and the texts by hole as the template writes them."""
        hidden, texts = self._hider.hide(self._turns(turns, context))
        check_fields(hidden, self._tokenizer)
        results = "".join(turn.text for turn in hidden if turn.role == "tool")
        if results and self._quotes_results:
            texts = {h: quoted(t) if h in results else t for h, t in texts.items()}
        return hidden, texts

    @functools.cached_property
    def _quotes_results(self) -> bool:
        return quotes_results(
            lambda turns: self._render(turns, False), self._hider, PROBE
        )

    def _turns(self, turns: Sequence[Turn], context: str) -> tuple[Turn, ...]:
        """With the system text, and with the context behind the first user turn.

        A row may contain the header of an input in its text. It then looks like a row
        with a context, which does no harm.
        """
        turns = list(turns)
        if self._system and turns[0].role != "system":
            turns.insert(0, Turn("system", self._system))
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        if context:
            text = turns[first].text + self._before_context + context
            turns[first] = dataclasses.replace(turns[first], text=text)
        if turns[0].role == "system" and turns[0].text and not self.takes_system:
            text = f"{turns[0].text}\n\n{turns[first].text}"
            turns[first] = dataclasses.replace(turns[first], text=text)
            del turns[0]
        return tuple(turns)

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes system messages; says so if it does not."""
        texts = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))
        turns, _ = self._hider.hide(texts)
        try:
            if turns[0].text in self._render(turns, False):
                return True
        except UserError:
            pass  # It is broken, or it has no such role; without it, we shall see.
        self.say(
            "the chat template has no system role; a system text is written in front "
            "of the first message of the user"
        )
        return False

    def _fill(
        self, cuts: Sequence[tuple[Sequence[Part], Mapping[str, str]]]
    ) -> list[list[Sequence[int]]]:
        """The ids of each part of each conversation."""
        filled: list[list[Any]] = [[part.ids for part in parts] for parts, _ in cuts]
        for before in Before:
            places, wholes = [], []
            for number, (parts, texts) in enumerate(cuts):
                for place, part in enumerate(parts):
                    if part.ids is None and part.before == before:
                        places.append((number, place))
                        wholes.append(part.fill(texts))
            ids = self._tokenizer.encode_texts(wholes, before)
            for (number, place), new in zip(places, ids, strict=True):
                filled[number][place] = new
        return filled

    def _cut_turns(self, turns: tuple[Turn, ...]) -> tuple[Part, ...]:
        cut = cut_conversation(self._render, self._tokenizer, turns)
        for note in cut.notes:
            self.say(note)
        return cut.parts

    def _cut_prompt_turns(self, turns: tuple[Turn, ...]) -> tuple[Part, ...]:
        return cut_prompt(self._render, self._tokenizer, turns)

    def say(self, note: str) -> None:
        """Adds to `notes`, and warns once."""
        if note not in self.notes:
            self.notes.append(note)
            logging.warning("data: %s", note)

    def _render(self, turns: Sequence[Turn], prompt: bool) -> str:
        calls = any(CALLS in turn.read_fields() for turn in turns)
        return self._render_as(turns, prompt, calls and self._text_arguments)

    def _render_as(self, turns: Sequence[Turn], prompt: bool, as_text: bool) -> str:
        own = template_variables(turns, as_text) | {"add_generation_prompt": prompt}
        return render_template(self._source, self._values | own)

    @functools.cached_property
    def _text_arguments(self) -> bool:
        """Whether the template joins arguments to its words, as some do."""
        for as_text in (False, True):
            with contextlib.suppress(UserError):
                self._render_as(ASKED, False, as_text)
                return as_text
        return False


def read_template_args(source: str, written: Sequence[str]) -> dict[str, Any]:
    """The variables of `config.data.template_args`, by name.

    Args:
      source: of the template.
      written: `name=value`; a value is a number, true, false, or else text.

    Raises:
      UserError: one has another form, or the template has no such variable.
    """
    values = {}
    words = set(re.findall(r"[A-Za-z_]\w*", source))
    for each in written:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier() or name in OWN_VARIABLES:
            raise UserError(
                f"config.data.template_args has {each!r}; it must be name=value with "
                "the name of a variable of the template, such as enable_thinking=False"
            )
        if name not in words:
            raise UserError(
                f"config.data.template_args sets {name!r}, and the chat template has "
                f"no such variable{nearest(name, words)}"
            )
        try:
            values[name] = json.loads(LITERALS.get(value, value))
        except ValueError:
            values[name] = value
    return values


def with_template_args(source: str, written: Sequence[str]) -> str:
    """A template in which the variables have the values of `read_template_args`.

    Other tools then prompt a model as it was trained, unless they set the variables.
    """
    defaults = [
        f"{{%- if {n} is not defined %}}{{%- set {n} = {value!r} %}}{{%- endif %}}"
        for n, value in read_template_args(source, written).items()
    ]
    # With `trim_blocks`, a line end behind a block is dropped: this one.
    return "".join(f"{each}\n" for each in defaults) + source
