"""Calls of tools in a conversation, which only its template knows how to write.

A template quotes names and arguments in its own way, so they stay in sight of it, where
texts are hidden. For that reason no control token may stand in them.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from research.core.errors import UserError
from research.tokenize.conversation import CALLS, TOOLS, Turn
from research.tokenize.templates.template_holes import CLOSE, OPEN, TextHider
from research.tokenize.templates.template_process import BEGIN_BLOCK, END_BLOCK
from research.tokenize.tokenizer import Tokenizer

PRIVATE = (OPEN, CLOSE, BEGIN_BLOCK, END_BLOCK)
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "f", "arguments": {}},
}
ASKED = (Turn("user", "q"), Turn("assistant", "", fields=json.dumps({CALLS: [CALL]})))
RESULT = {"name": "f", "tool_call_id": "abcdefghi"}


def check_fields(turns: Sequence[Turn], tokenizer: Tokenizer) -> None:
    """Raises UserError if a tool or a call could forge what a template writes."""
    for fields in (turn.fields for turn in turns if turn.fields):
        found = [
            fields[start:end]
            for i, start, end in tokenizer.find_added(fields)
            if i in tokenizer.control_ids
        ]
        if found or any(mark in fields for mark in PRIVATE):
            raise UserError(
                f"a tool or a call holds {(found or ['a mark of holes'])[0]!r}, a "
                "control token: write it in another way"
            )


def check_tools(render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn]) -> None:
    """Raises UserError if the template does not write the tools of `turns`."""
    bare = [_changed(turn, lambda fields: fields.pop(TOOLS, None)) for turn in turns]
    if bare != list(turns) and render(bare) == render(turns):
        raise UserError(
            "the chat template does not write the list of tools, so a model could not "
            "know them; take a base model whose template does, or ignore the column "
            f"with --config.data.columns.ignored=\"('{TOOLS}',)\""
        )


def end_of_calls(
    render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], index: int
) -> int:
    """Where the arguments of the last call of a turn end in the rendered text.

    Another argument is added to them. Behind it, both texts are the same.

    Raises:
      UserError: the template does not write calls.
    """

    def add(fields: dict[str, Any]) -> None:
        fields[CALLS][-1]["function"]["arguments"][f"{OPEN}calls{CLOSE}"] = 0

    longer = [*turns]
    longer[index] = _changed(turns[index], add)
    text, written = render(turns), render(longer)
    if text == written:
        raise UserError(
            "the chat template does not write calls of tools; take a base model whose "
            "template does, or write each call as the content of its message"
        )
    pairs = zip(reversed(text), reversed(written), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return len(text) - sum(1 for _ in same)


def quotes_results(
    render: Callable[[Sequence[Turn]], str], hider: TextHider, probe: str
) -> bool:
    """Whether the template writes the results of tools as JSON texts.

    Args:
      render: the template.
      hider: of its texts.
      probe: a text that quoting changes.

    Raises:
      UserError: it changes them in another way.
    """
    result = Turn("tool", probe, fields=json.dumps(RESULT))
    plain = (Turn("assistant", "a"), Turn("tool", probe))
    for turns in ((*ASKED, result), (ASKED[0], *plain)):
        hidden, texts = hider.hide(turns)
        try:
            written, true = render(hidden), render(turns)
        except UserError:
            continue  # It needs other messages, or has no such role.
        for write in (str, quoted):
            filled = written
            for hole, text in texts.items():
                filled = filled.replace(hole, write(text))
            if filled == true:
                return write is quoted
        raise UserError(
            "the chat template changes the texts of tools' results, as with a filter, "
            "so they cannot be kept apart from its own words; use "
            "--config.data.template=dolly"
        )
    return False


def quoted(text: str) -> str:
    """A text as it stands inside a JSON text."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _changed(turn: Turn, change: Callable[[dict[str, Any]], Any]) -> Turn:
    fields = turn.read_fields()
    change(fields)
    return dataclasses.replace(turn, fields="").with_fields(**fields)
