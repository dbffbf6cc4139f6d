"""A training row as a conversation, the one form of rows from every source."""

import dataclasses
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: one of `ROLES`.
      text: the message.
      trained: whether an answer counts in the loss.
    """

    role: str
    text: str
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Record:
    """One training row: a conversation that ends with an answer.

    Attributes:
      turns: the messages in order.
      context: a passage that belongs to the first user turn, or "".
      category: the group under which its loss is reported, or "".
      where: `file:line`, for messages to the user.
      schema: the columns that it was read from, for people.
    """

    turns: tuple[Turn, ...]
    context: str
    category: str
    where: str
    schema: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Undoes `dataclasses.asdict`."""
        turns = tuple(Turn(**turn) for turn in values["turns"])
        return cls(**{**values, "turns": turns})
