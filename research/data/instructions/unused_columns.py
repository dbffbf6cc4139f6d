"""Columns that hold something and that no row is made of.

An answer about a passage that the model never sees is the most quiet of all defects of
the data, so a column whose name says that it holds material must be mapped or ignored.
"""

import dataclasses
import decimal
import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.config.data_knobs import ColumnsConfig
from research.core.errors import UserError
from research.tokenize.conversation import Record

# Names that people give the material of a request, in singular and without "text".
NAMES = (
    "abstract article background body chat chathistory code content context "
    "conversation data dialog dialogue document doc email evidence excerpt fact "
    "hint history input instruction knowledge material message paragraph passage "
    "premise problem prompt query question request schema snippet story system "
    "systemmessage systemprompt table text transcript userinput usermessage "
    "userprompt"
)
MATERIAL = frozenset(NAMES.split())
SYSTEM = ("system", "systemmessage", "systemprompt")
# Beside a chat whose column the user has named, a request and an answer are its first
# two turns once more, often in other words.
REQUESTS = {"instruction", "problem", "prompt", "query", "question", "request"}
ANSWERS = {"answer", "completion", "output", "reply", "response", "solution"}
KNOWN = MATERIAL | ANSWERS
# Words in longer names of material, such as `manual_page`.
PARTS = {"chapter", "comment", "description", "manual", "note", "page", "section"}
LONG_TEXT = 200  # letters that may be material, whatever the name
# A column of few short values, which come back, may be the category.
MOST_LABELS, LONGEST_LABEL = 64, 40
# The first edition of the rules in which such a column stops a run.
REFUSED_SINCE = 3
# Values that can be mapped as they are.
AS_TEXT = str | bytes | bool | int | float | decimal.Decimal
UnusedFacts = dict[str, dict[str, Any]]
# A file of objects may have a new name in every row; no table has so many columns.
MOST_COLUMNS = 1000


@dataclasses.dataclass
class UnusedColumn:
    """A column that some rows fill and that none of them uses.

    Attributes:
      rows: how many rows fill it.
      where: the first of them, `file:line`.
      letters: of the value there.
      new: `where` of the first row in which it says what the row's texts do not; "" if
        it only repeats them, as a column with the whole prompt does.
      names: the columns that row was read from: chat messages, or request, context
        and answer.
      is_short: whether a row has it as the request of its chat's short form, in words
        that are not the chat's.
      kind: the type of its values if they are no texts, or "".
      labels: its different values, as long as they are few and short, else None.
    """

    rows: int
    where: str
    letters: int
    new: str = ""
    names: Sequence[str] = ()
    is_short: bool = False
    kind: str = ""
    labels: set[str] | None = dataclasses.field(default_factory=set)

    def add_label(self, texts: Sequence[str]) -> None:
        """Notes the texts of one more row."""
        if self.labels is not None:
            self.labels.update(texts)
            is_label = len(texts) == 1 and len(texts[0]) <= LONGEST_LABEL
            if not is_label or len(self.labels) > MOST_LABELS:
                self.labels = None


class UnusedColumns:
    """Counts the columns of rows that are filled and not used."""

    def __init__(self, columns: ColumnsConfig):
        self._columns = columns
        self._used: set[str] = set()
        self._found: dict[str, UnusedColumn] = {}
        self._rows = 0
        self._chat_is_named = columns.messages != ColumnsConfig().messages

    def add(
        self,
        filled: Mapping[str, Any],
        used: set[str],
        names: Sequence[str],
        record: Record,
    ) -> None:
        """Counts a row that became `record`.

        Args:
          filled: its values by column, without those that are missing or null.
          used: the columns that it was made of.
          names: those of its request, context and answer, or fewer of its chat.
          record: the row's texts.
        """
        self._rows += 1
        for name in (used & filled.keys()) - self._used:
            if any(_texts(filled[name])):
                self._used.add(name)
        new, has_answer = [], False
        for name in (x for x in filled if x not in used):
            texts = list(_texts(filled[name]))
            letters = sum(map(len, texts))
            if not letters:
                continue
            has_answer |= name == self._columns.response or plain_name(name) in ANSWERS
            found = self._found.get(name)
            if found is None:
                if len(self._found) >= MOST_COLUMNS and not is_material(name):
                    continue
                found = self._found[name] = UnusedColumn(0, record.where, letters)
            found.rows += 1
            found.add_label(texts)
            if not isinstance(filled[name], AS_TEXT):
                found.kind = type(filled[name]).__name__
            if not found.new and is_material(name) and not _repeats(texts, record):
                new.append(name)
        requests = [name for name in new if plain_name(name) in REQUESTS]
        is_named = self._chat_is_named and len(names) == 1
        for name in new:
            found = self._found[name]
            # Two requests are no short form: one of them holds something else.
            if is_named and has_answer and requests == [name]:
                found.is_short = True
            else:
                found.new, found.names = record.where, names

    def facts(self) -> UnusedFacts:
        """Facts for the doctor by column, the one that most rows fill first."""
        most_first = sorted(self._found.items(), key=lambda pair: -pair[1].rows)
        return {
            name: {
                "rows": each.rows,
                "share": each.rows / self._rows,
                "where": each.where,
                "letters": each.letters,
                "is_material": bool(each.new) or each.is_short,
                "labels": self._labels(each),
            }
            for name, each in most_first
        }

    def _labels(self, found: UnusedColumn) -> int:
        """How many values it has, if it may be the category that the rows lack."""
        count = len(found.labels or ())
        is_common = 2 * found.rows >= self._rows and 2 * count <= found.rows
        has_none = self._columns.category not in self._used
        return count if has_none and is_common and count > 1 else 0

    def check(self) -> None:
        """Refuses material that is neither mapped nor ignored.

        Raises:
          UserError: it names each such column, and the flags for both.
        """
        lost = {name: each for name, each in self._found.items() if each.new}
        if not lost:
            return
        ignored = (*self._columns.ignored, *sorted(lost))
        lines = [
            f"column {name!r} is filled in {each.rows:,} row{'s' * (each.rows > 1)}, "
            f"as in {each.new}, and not used: {self._remedy(name, each)}"
            for name, each in sorted(lost.items())
        ]
        raise UserError(
            "\n".join(lines) + "\nif the model must not see it, say so with "
            f'--config.data.columns.ignored="{ignored}"'
        )

    def _remedy(self, name: str, found: UnusedColumn) -> str:
        columns, names = self._columns, found.names
        first = f"join each {found.kind} into one text, then " if found.kind else ""
        if plain_name(name) in SYSTEM and columns.system not in self._used:
            return f"{first}map it with {column_flag('system', name)}"
        if len(names) < 3:
            return f"the messages in {names[0]!r} must have it"
        if names[1] in self._used:
            return f"join it with {names[1]!r}, which is the rows' context"
        flags = {"instruction": names[0], "response": names[2], "context": name}
        return f"{first}map it with " + " ".join(
            column_flag(field, column)
            for field, column in flags.items()
            if column != getattr(columns, field) or field == "context"
        )


def describe_unused(unused: UnusedFacts) -> list[str]:
    """A line for people on each unused column; `unused` are its facts by name."""
    lines = []
    for name, facts in unused.items():
        line = f"{name}: filled in {facts['share']:.1%} of the rows, "
        line += f"{facts['letters']:,} letters in {facts['where']}"
        if labels := facts.get("labels"):  # Older caches lack it.
            line += (
                f"; {column_flag('category', name)} reports the loss of each of its "
            )
            line += f"{labels} values"
        lines.append(line)
    return lines


def needs_look(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a user should look at an unused column, though it may be meant."""
    letters, parts = facts["letters"], re.findall(r"[a-z]+", name.casefold())
    is_named = letters > LONGEST_LABEL and any(
        plain_name(part) in MATERIAL | PARTS for part in parts
    )
    return facts["is_material"] or letters >= LONG_TEXT or is_named


def column_flag(field: str, column: str) -> str:
    """The flag that says what a column of the rows is."""
    return shlex.quote(f"--config.data.columns.{field}={column}")


def is_material(name: str) -> bool:
    """Whether a column of this name usually holds what a request is about."""
    return plain_name(name) in MATERIAL


@functools.lru_cache(MOST_COLUMNS)
def plain_name(name: str) -> str:
    """`Input Texts_2` as `input`."""
    letters = re.sub(r"[\W\d_]", "", name).casefold()
    for known in (letters, letters.removesuffix("s")):
        for end in ("", "text"):
            if known.removesuffix(end) in KNOWN:
                return known.removesuffix(end)
    return letters


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value: of messages only what they say."""
    if isinstance(value, dict):
        said = [value[k] for k in ("content", "value") if k in value]
        for each in said or value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if words := " ".join(str(text).split()):
            yield words


def _repeats(texts: Sequence[str], record: Record) -> bool:
    """Whether the texts are in what the model reads, or are copies of what it answers.

    A copy is an answer from end to end, or has all of the record's texts in it. A
    passage that an answer quotes is none, as the model has to answer without it.
    """
    read, answers = [" ".join(record.context.split())], []
    for turn in record.turns:
        own = answers if turn.role == "assistant" else read
        own.append(" ".join(turn.text.split()))
    joined = " ".join(texts)
    return all(
        text in answers or any(text in words for words in read) for text in texts
    ) or all(words in joined for words in (*read, *answers))
