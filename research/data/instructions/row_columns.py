"""The columns of a row as a `Record`: a request and its answer, or chat messages.

The schema is found row by row. A column that is missing or null is absent.
"""

import collections
import decimal
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from research.config.data_knobs import NEWEST_EDITION, ColumnsConfig
from research.core.errors import nearest
from research.data.instructions.tool_messages import (
    CALLING_ROLES,
    OLD_CALL,
    check_results,
    describes,
    read_calls,
    read_result,
    read_tools,
)
from research.data.instructions.unused_columns import UnusedColumns, column_flag
from research.data.row_readers import BadRowError, TableRow
from research.tokenize.conversation import CALLS, TOOLS, Record, Turn

DEFAULTS = ColumnsConfig()
MISSING = "missing column"
CHATS = ("messages", "conversations")
# Request, context and answer, where the config renames none of them.
KNOWN_COLUMNS = (
    ("instruction", "input", "output"),  # Alpaca's.
    ("prompt", "", "completion"),
)
# The names that chat data has for the roles: OpenAI's, ShareGPT's, and others'.
ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
# The first edition of the rules in which tools and their calls are read, and the names
# of roles since then.
TOOLS_SINCE = 4
NEWER_NAMES = {
    "function": "tool", "tool_response": "tool",
    **dict.fromkeys(CALLING_ROLES, "assistant"),
}  # fmt: skip


def to_record(
    row: Mapping[str, Any],
    columns: ColumnsConfig,
    where: str,
    notes: collections.Counter[str] | None = None,
    edition: int = NEWEST_EDITION,
    unused: UnusedColumns | None = None,
    is_test: bool = False,
) -> Record:
    """Makes a `Record` from the columns of a row.

    Args:
      row: values by column.
      columns: names of the columns.
      where: `file:line`.
      notes: counts what a user should know, in sentences.
      edition: of the rules. In the first, an answer loses the white space in front of
        it, and there is no column of system texts. Before `TOOLS_SINCE`, a list of
        tools is not used, and a row that calls one is refused.
      unused: counts the columns that the record is not made of.
      is_test: the row is for a test. It may lack an answer, and the last turn is then
        empty; or have several, in a list, or in a list `text` as SQuAD has them.

    Raises:
      BadRowError: this row cannot be used: a column is missing, a value is of a wrong
        type, or an answer is empty.
    """
    notes = collections.Counter() if notes is None else notes
    edition = edition or NEWEST_EDITION
    return _Row(row, columns, where, notes, edition, is_test).record(unused)


class _Row:
    def __init__(
        self,
        row: Mapping[str, Any],
        columns: ColumnsConfig,
        where: str,
        notes: collections.Counter[str],
        edition: int,
        is_test: bool,
    ):
        self._is_test = is_test
        self._is_old = edition == 1
        self._reads_tools = edition >= TOOLS_SINCE
        self._row = {k: v for k, v in row.items() if k not in columns.ignored}
        if isinstance(row, TableRow) and self._reads_tools:
            self._row = {k: _without_nulls(v) for k, v in self._row.items()}
        self._present = {k: v for k, v in self._row.items() if not _is_absent(v)}
        self._columns = columns
        self._where = where
        self._notes = notes

    def record(self, unused: UnusedColumns | None) -> Record:
        names = self._schema()
        request, context, answer = names if len(names) == 3 else ("", "", "")
        values = [self._present.get(name) for name in names]
        others: Sequence[str] = ()
        if len(names) == 1:
            turns, context = self._chat(values[0], names[0]), ""
        elif isinstance(values[0], list) and (
            isinstance(values[-1], list) or (self._is_test and values[-1] is None)
        ):
            turns = self._chat(values[0] + (values[-1] or []), request)
            names, context = (request, answer), ""
        else:
            said, *others = self._answers(answer)
            turns = (Turn("user", self._text(request)), Turn("assistant", said))
            context = self._text(context)
            if not turns[0].text and not context:
                raise self._bad(
                    "empty instruction", "instruction and context are empty"
                )
        system = "" if self._is_old else self._text(self._columns.system)
        if system and turns[0].role != "system":
            turns = (Turn("system", system), *turns)
        answers = [turn for turn in turns if turn.role == "assistant"]
        needed = answers[:-1] if self._is_test else answers
        if not all(turn.said.strip() for turn in needed):
            raise self._bad("empty response", "a response is empty")
        if not any(turn.trained for turn in answers):
            raise self._bad("empty response", "the weight of every answer is 0")
        schema = " and ".join(dict.fromkeys((names[0], names[-1])))
        record = Record(
            turns, context, self._category(), self._where, schema, tuple(others)
        )
        if unused:
            used = {*names, self._columns.category}
            used |= set() if self._is_old else {self._columns.system}
            used |= {TOOLS} if any(TOOLS in x.read_fields() for x in turns) else set()
            unused.add(self._present, used, names, record)
        return record

    def _schema(self) -> tuple[str, ...]:
        """One column of chat messages, or those of request, context and answer."""
        columns = self._columns
        own = (columns.instruction, columns.context, columns.response)
        renamed = own != (DEFAULTS.instruction, DEFAULTS.context, DEFAULTS.response)
        chat_renamed = columns.messages != DEFAULTS.messages
        chats = [(columns.messages,)]
        if not chat_renamed and not renamed:
            chats = [(name,) for name in CHATS]
        pairs = [own] if renamed else [own, *KNOWN_COLUMNS]
        for row in (self._present, self._row):
            fitting = [each for each in chats if each[0] in row]
            others = [each for each in pairs if each[0] in row and each[-1] in row]
            # A chat column wins if the config names it; a pair wins over others.
            order = fitting + others if chat_renamed else others + fitting
            if order:
                return order[0]
            # Context alone, or an answer without a request, are empty, not missing.
            if columns.response in row and columns.context in row:
                return own
        for names in pairs if self._is_test else ():
            # Another column may have the answer, so there must be none.
            if names[0] in self._present and not self._others(names):
                return names
        field = "response" if columns.instruction in self._row else "instruction"
        if chat_renamed and not renamed:
            field = "messages"
        name = getattr(columns, field)
        bad = self._bad(
            MISSING,
            f"no column {name!r} for config.data.columns.{field}"
            f"{nearest(name, self._row)}; the row has "
            f"{', '.join(map(repr, self._row))}",
        )
        asked = next((x for x in pairs if x[0] in self._present), ())
        if self._is_test and asked:
            ignored = (*columns.ignored, *self._others(asked))
            bad.remedy = (
                f"{map_columns(self._row)}; or, if they hold no reference, ignore the "
                f'other columns with --config.data.columns.ignored="{ignored}"'
            )
        raise bad

    def _others(self, names: Sequence[str]) -> list[str]:
        """The columns that are filled and neither `names` nor a category or system."""
        used = {*names, self._columns.category, self._columns.system}
        return [name for name in self._present if name not in used]

    def _answers(self, name: str) -> list[str]:
        """The answer, and behind it others that are as good, of which tests have any.

        A row of a test without an answer has an empty one.
        """
        value = self._present.get(name)
        if self._is_test:
            if isinstance(value, dict) and isinstance(value.get("text"), list):
                value = value["text"]
            if isinstance(value, list):
                texts = [self._as_text(x, name, is_answer=True) for x in value]
                return list(dict.fromkeys(filter(str.strip, texts))) or [""]
        return [self._as_text(value, name, is_answer=True)]

    def _category(self) -> str:
        name = self._columns.category
        if isinstance(self._present.get(name), list | dict):
            self._notes[
                f"values of {name!r} that are lists or objects are no label"
            ] += 1
            return ""
        return self._text(name).strip()

    def _text(self, name: str, is_answer: bool = False) -> str:
        value = self._present.get(name) if name else None
        return self._as_text(value, name, is_answer)

    def _as_text(
        self, value: Any, name: str, is_answer: bool, is_result: bool = False
    ) -> str:
        """The text of a value.

        Numbers and booleans are written as in JSON. An answer is cut at its end only,
        as a program in an indented language begins with white space. The result of a
        tool is not cut: templates write all of it.
        """
        if value is None:
            return ""
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise self._bad("not UTF-8", f"{name}: {error}") from error
        elif isinstance(value, bool | int | float | decimal.Decimal):
            kind = "booleans" if isinstance(value, bool) else "numbers"
            self._notes[f"{kind} in {name!r} are read as text"] += 1
            decimals = isinstance(value, decimal.Decimal)
            value = str(value) if decimals else json.dumps(value)
        if not isinstance(value, str):
            raise self._bad("wrong type", f"{name} is {type(value).__name__}, not text")
        # No tokenizer accepts a lone surrogate. JSON allows it, and readers of CSV put
        # it in the place of a byte that is not UTF-8.
        if not value.isascii() and value != value.encode("utf-8", "replace").decode():
            byte = next((x for x in value if "\udc80" <= x <= "\udcff"), "")
            why = (
                f"{name} has the byte 0x{ord(byte) - 0xDC00:02x}, which is not UTF-8 "
                "(iconv -f latin1 -t utf-8 converts Latin-1)"
                if byte
                else f"{name} has a lone surrogate"
            )
            raise self._bad("not Unicode", why)
        if is_result and self._reads_tools:
            return value
        return value.rstrip() if is_answer and not self._is_old else value.strip()

    def _chat(self, messages: Any, name: str) -> tuple[Turn, ...]:
        if not isinstance(messages, list) or not messages:
            raise self._bad("wrong type", f"{name} is not a list of messages")
        turns = tuple(self._turn(message) for message in messages)
        roles = [turn.role for turn in turns]
        said = roles[1:] if roles[0] == "system" else roles
        if self._is_test and _alternates([*said, "assistant"]):
            turns = (*turns, Turn("assistant", ""))
        elif not _alternates(said):
            problem = (
                f"{name} ends with a turn of the {said[-1]}, and the answer is missing"
                if _alternates([*said, "assistant"])
                else f"{name} must alternate user and assistant, not "
                f"{' '.join(roles[:12])}"
            )
            raise self._bad("not alternating", problem)
        if not self._reads_tools:
            return turns
        try:
            turns = self._with_tools(turns, roles)
            check_results(turns)
        except ValueError as error:
            raise self._bad("tool calls", str(error)) from error
        return turns

    def _with_tools(
        self, turns: tuple[Turn, ...], roles: Sequence[str]
    ) -> tuple[Turn, ...]:
        """With the row's tools on the first message of the user. Raises ValueError."""
        tools = read_tools(self._present.get(TOOLS))
        if not tools:
            return turns
        own = (
            turns[0].text if roles[0] == "system" else self._text(self._columns.system)
        )
        if describes(own, tools):
            self._notes["tools that the system text describes are not added to it"] += 1
            return turns
        first = roles.index("user")
        return (
            *turns[:first],
            turns[first].with_fields(tools=tools),
            *turns[first + 1 :],
        )

    def _turn(self, message: Any) -> Turn:
        fields = message if isinstance(message, dict) else {}
        given = fields.get("role") or fields.get("from")
        roles = ROLE_NAMES | (NEWER_NAMES if self._reads_tools else {})
        role = roles.get(given) if isinstance(given, str) else None
        if role is None:
            raise self._bad(
                "wrong type",
                f"a message needs a role of {', '.join(roles)}, not {given!r}",
            )
        if not self._reads_tools and any(fields.get(k) for k in (CALLS, OLD_CALL)):
            raise self._bad(
                "tool calls",
                f"a message calls tools, which edition {TOOLS_SINCE - 1} of the rules "
                "does not read",
            )
        try:
            calls = read_calls(fields) if self._reads_tools else []
        except ValueError as error:
            raise self._bad("tool calls", str(error)) from error
        if calls and role != "assistant":
            raise self._bad("tool calls", f"a message of the {given} calls tools")
        content = next(
            (fields[k] for k in ("content", "value") if not _is_absent(fields.get(k))),
            None,
        )
        if given in CALLING_ROLES:
            content = None  # The call itself.
        if isinstance(content, list):
            content = "".join(self._part(part) for part in content)
        weight = fields.get("weight")
        if weight not in (None, 0, 1):
            raise self._bad("wrong type", f"weight is {weight!r}; it must be 0 or 1")
        is_answer = role == "assistant"
        text = self._as_text(content, "content", is_answer, role == "tool")
        turn = Turn(role, text, trained=not is_answer or weight != 0)
        if not self._reads_tools:
            return turn
        own = read_result(fields) if role == "tool" else {CALLS: calls or None}
        try:
            return turn.with_fields(**own)
        except ValueError as error:
            raise self._bad("tool calls", str(error)) from error

    def _part(self, part: Any) -> str:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise self._bad(
                "wrong type", f"content has a part of {kind!r}, not of text"
            )
        return text

    def _bad(self, reason: str, detail: str) -> BadRowError:
        return BadRowError(reason, self._where, detail)


def map_columns(row: Mapping[str, Any]) -> str:
    """How to name the columns of a row that has none of the usual names."""
    names = [*row] if len(row) == 2 else ["COLUMN", "COLUMN"]
    flags = map(column_flag, ("instruction", "response"), names)
    return f"name the columns with {' '.join(flags)}, or messages for chats"


def _without_nulls(value: Any) -> Any:
    """A value of a table, whose structs have only the fields that are set.

    A null that stood in an object before it became a table is dropped, too: the table
    does not know it from a field that was missing.
    """
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _is_absent(value: Any) -> bool:
    """Tables have NaN where a number is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _alternates(roles: Sequence[str]) -> bool:
    """Whether users ask and assistants answer; tools may reply before an answer ends.

    A reply of tools stands between two messages of the assistant.
    """
    last = ""
    for role in roles:
        expected = {
            "": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }
        if role not in expected.get(last, ()):
            return False
        last = role
    return last == "assistant"
