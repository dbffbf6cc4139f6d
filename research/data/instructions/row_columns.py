"""The columns of a row as a `Record`: instruction and response, or chat messages."""

from typing import Any

from research.config.knob_groups import ColumnsConfig
from research.core.errors import UserError, nearest
from research.data.row_readers import BadRowError
from research.tokenize.conversation import ROLES, Record, Turn


def to_record(row: dict[str, Any], columns: ColumnsConfig, where: str) -> Record:
    """Makes a `Record` from the columns of a row.

    Raises:
      UserError: a mapped column does not exist (the mapping is wrong, not the row).
      BadRowError: this row cannot be used: wrong types, or an empty answer.
    """
    if columns.messages in row and columns.response not in row:
        turns, context = _chat_turns(row[columns.messages], where), ""
    else:
        for field in ("instruction", "response"):
            _require(row, getattr(columns, field), field, where)
        turns = (
            Turn("user", _text(row, columns.instruction, where)),
            Turn("assistant", _text(row, columns.response, where)),
        )
        context = _text(row, columns.context, where)
        if not turns[0].text and not context:
            raise BadRowError(
                "empty instruction", where, "instruction and context are empty"
            )
    if not all(turn.text for turn in turns if turn.role == "assistant"):
        raise BadRowError("empty response", where, "a response is empty")
    return Record(turns, context, _text(row, columns.category, where), where)


def _require(row: dict[str, Any], column: str, field: str, where: str) -> None:
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r} for config.data.columns.{field}"
            f"{nearest(column, row)}; the row has {', '.join(map(repr, row))}"
        )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRowError(
            "wrong type", where, f"{column} is {type(value).__name__}, not text"
        )
    # JSON allows a lone surrogate, but no tokenizer accepts it.
    if not value.isascii() and value != value.encode("utf-8", "replace").decode():
        raise BadRowError("not Unicode", where, f"{column} has a lone surrogate")
    return value.strip()


def _chat_turns(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise BadRowError("wrong type", where, "messages is not a list of messages")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRowError(
                "wrong type", where, f"a message needs a role of {', '.join(ROLES)}"
            )
        turns.append(Turn(message["role"], _text(message, "content", where)))
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadRowError(
            "not alternating",
            where,
            f"messages must alternate user and assistant, not {' '.join(roles)}",
        )
    return tuple(turns)
