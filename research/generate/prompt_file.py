"""Prompts of a file: lines of text, or rows with a prompt or with messages."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.json_files import mismatch
from research.data.row_readers import READERS, BadRowError, read_rows
from research.tokenize.conversation import ROLES, Turn

MESSAGES = [{"role": str, "content": str}]


@dataclasses.dataclass(frozen=True)
class FilePrompt:
    """One prompt.

    Attributes:
      where: `file:line`.
      given: the fields of its row that name it again beside its answer.
      turns: the conversation that it asks to continue.
      context: material that belongs to the first turn.
      problem: why it is none; "" if it is one.
    """

    where: str
    given: Mapping[str, Any]
    turns: tuple[Turn, ...] = ()
    context: str = ""
    problem: str = ""

    @property
    def line(self) -> int:
        """The number of its line, counted from 1."""
        return int(self.where.rpartition(":")[2])


def read_prompts(path: Path) -> Iterator[FilePrompt]:
    """Yields the prompts of a file, and what is wrong in the place of those that fail.

    A `.jsonl`, `.json`, `.csv` or `.parquet` file has rows with `prompt`, a text, or
    with `messages`, a list of `{"role": ..., "content": ...}`; `context` and `id` may
    stand beside them. Any other file has a prompt in each line that is not empty.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"--prompts={path} is no file")
    if path.suffix in READERS:
        for where, row in read_rows(path):
            yield _from_row(where, row)
        return
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from text_prompts(file, path.name)
    except OSError as error:
        raise UserError(f"--prompts={path} cannot be read: {error.strerror}") from error


def text_prompts(lines: Iterable[str], name: str) -> Iterator[FilePrompt]:
    """The lines that are not empty, each a prompt; `name` is that of their file."""
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\n")
        if text.strip():
            where = f"{name}:{number}"
            yield FilePrompt(where, {"prompt": text}, (Turn("user", text),))


def _from_row(where: str, row: Mapping[str, Any] | BadRowError) -> FilePrompt:
    if isinstance(row, BadRowError):
        return FilePrompt(where, {}, problem=row.detail)
    kinds = {"prompt": str, "messages": MESSAGES}
    given = {name: row[name] for name in ("id", *kinds) if row.get(name) is not None}
    context = row.get("context") or ""
    found = [name for name in kinds if name in given]
    if len(found) != 1:
        problem = f"it has {' and '.join(found) or 'neither prompt nor messages'}"
        problem += "; it must have one of them"
    elif row.get("tools"):
        problem = "it has tools, which are not passed to the model here"
    else:
        problem = mismatch(given[found[0]], kinds[found[0]], found[0])
        problem = problem or mismatch(context, str, "context")
    if problem:
        return FilePrompt(where, given, problem=problem)
    if "prompt" in given:
        turns = (Turn("user", given["prompt"]),)
    else:
        turns = tuple(Turn(x["role"], x["content"]) for x in given["messages"])
    if not any(turn.text.strip() for turn in turns[-1:]) and not context.strip():
        problem = f"{found[0]} is empty"
    elif odd := [turn.role for turn in turns if turn.role not in ROLES]:
        problem = f"{odd[0]!r} is no role; it must be one of {', '.join(ROLES)}"
    elif turns[-1].role != "user":
        problem = f"the last message is of the {turns[-1].role}; it must be the user's"
    return FilePrompt(where, given, turns, context, problem)
