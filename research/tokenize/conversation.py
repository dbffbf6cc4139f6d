"""A training row as a conversation, the one form of rows from every source."""

import dataclasses

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message; `role` is one of `ROLES`."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One training row: a conversation that ends with an answer.

    Attributes:
      turns: the messages in order.
      context: a passage that belongs to the first user turn, or "".
      category: the group under which its loss is reported, or "".
      where: `file:line`, for messages to the user.
    """

    turns: tuple[Turn, ...]
    context: str
    category: str
    where: str
