"""A training row as a conversation, the one form of rows from every source."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
CALLS, TOOLS = "tool_calls", "tools"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: one of `ROLES`.
      text: the message.
      trained: whether an answer counts in the loss.
      fields: a JSON object with what the message has beside its text: `CALLS` of an
        answer, the name and `tool_call_id` of a result. On one message of a
        conversation, `TOOLS` are those that it can call.
    """

    role: str
    text: str
    trained: bool = True
    fields: str = ""

    def read_fields(self) -> dict[str, Any]:
        """`fields` by name."""
        return json.loads(self.fields) if self.fields else {}

    def with_fields(self, **more: Any) -> "Turn":
        """The same message with more fields; values that are None are none.

        Raises:
          ValueError: JSON in UTF-8 has no such value.
        """
        more = {name: value for name, value in more.items() if value is not None}
        fields = self.read_fields() | more
        try:
            text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            names = " and ".join(more)
            raise ValueError(f"{names} cannot be JSON in UTF-8: {error}") from error
        text = text if fields else ""
        return dataclasses.replace(self, fields=text)

    @property
    def said(self) -> str:
        """The text with the calls, for people."""
        calls = self.read_fields().get(CALLS, [])
        functions = [json.dumps(x["function"], ensure_ascii=False) for x in calls]
        return "\n".join(filter(None, [self.text, *functions]))


def template_variables(
    turns: Sequence[Turn], text_arguments: bool = False
) -> dict[str, Any]:
    """The variables `messages` and `tools` of a chat template.

    `text_arguments`: the arguments of calls are JSON texts, and not objects.
    """
    messages, tools = [], None
    for turn in turns:
        fields = turn.read_fields()
        tools = fields.pop(TOOLS, tools)
        for function in (call["function"] for call in fields.get(CALLS, [])):
            if text_arguments:
                arguments = json.dumps(function["arguments"], ensure_ascii=False)
                function["arguments"] = arguments
        messages.append({"role": turn.role, "content": turn.text, **fields})
    return {"messages": messages, "tools": tools}


@dataclasses.dataclass(frozen=True)
class Record:
    """One training row: a conversation that ends with an answer.

    Attributes:
      turns: the messages in order.
      context: a passage that belongs to the first user turn, or "".
      category: the group under which its loss is reported, or "".
      where: `file:line`, for messages to the user.
      schema: the columns that it was read from, for people.
      other_answers: answers of a test row that are as good as the last turn.
    """

    turns: tuple[Turn, ...]
    context: str
    category: str
    where: str
    schema: str = ""
    other_answers: tuple[str, ...] = ()

    @property
    def has_answer(self) -> bool:
        """Whether the last turn says something; a row of a test may be a prompt."""
        return bool(self.turns[-1].said.strip())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Undoes `dataclasses.asdict`."""
        turns = tuple(Turn(**turn) for turn in values["turns"])
        others = tuple(values.get("other_answers", ()))
        return cls(**{**values, "turns": turns, "other_answers": others})
