"""Prompts of a file: lines of text, or rows with a prompt or with messages."""

import dataclasses
import io
import logging
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from research.config.data_knobs import ColumnsConfig
from research.core.errors import UserError, nearest
from research.core.json_files import mismatch
from research.core.local_paths import require_file
from research.data.compressed_files import kind_of, open_bytes, read_error
from research.data.file_content import refuse_other_content
from research.data.instructions.row_columns import CHATS, KNOWN_COLUMNS, ROLE_NAMES
from research.data.instructions.unused_columns import (
    REQUESTS,
    is_material,
    plain_name,
)
from research.data.row_readers import READERS, BadRowError, read_rows
from research.tokenize.conversation import ROLES, Turn

MESSAGES = [{"role": str, "content": str}]
# Endings of rows that would be read as lines of text, and those that are read as rows.
OTHER_ENDINGS = {".tsv": ".csv", ".tab": ".csv", ".ndjson": ".jsonl"}


@dataclasses.dataclass(frozen=True)
class PromptColumns:
    """Where rows have their prompts.

    Attributes:
      pairs: a column of prompts and one of their material, "" for none. The first that
        a row has counts.
      system: the column of system texts.
      must_fill: the column of material that some row must fill, "" for none.
    """

    pairs: tuple[tuple[str, str], ...]
    system: str = "system"
    must_fill: str = ""

    @classmethod
    def of(
        cls, columns: ColumnsConfig, prompt: str = "", context: str = ""
    ) -> "PromptColumns":
        """Those of training, where no flag names a column of prompts or of material."""
        usual, beside = ColumnsConfig(), context or columns.context
        if prompt:
            return cls(((prompt, beside),), columns.system, context)
        own = [(columns.messages, ""), (columns.instruction, beside)]
        chosen = [x for x in own if x[0] not in (usual.messages, usual.instruction)]
        known = [("prompt", beside), *((name, "") for name in CHATS), own[1]]
        known += [(request, context or name) for request, name, _ in KNOWN_COLUMNS]
        return cls((*chosen, *known), columns.system, context)


USUAL = PromptColumns.of(ColumnsConfig())


@dataclasses.dataclass(frozen=True)
class FilePrompt:
    """One prompt.

    Attributes:
      where: `file:line`.
      given: the fields of its row that name it again beside its answer.
      turns: the conversation that it asks to continue.
      context: material that belongs to the first turn.
      problem: why it is none; "" if it is one.
      unused: columns of its row with material that the model does not see.
    """

    where: str
    given: Mapping[str, Any]
    turns: tuple[Turn, ...] = ()
    context: str = ""
    problem: str = ""
    unused: tuple[str, ...] = ()

    @property
    def line(self) -> int:
        """The number of its line, counted from 1."""
        return int(self.where.rpartition(":")[2])


def read_prompts(path: Path, columns: PromptColumns = USUAL) -> Iterator[FilePrompt]:
    """Yields the prompts of a file, and what is wrong in the place of those that fail.

    A row of a `.jsonl`, `.json`, `.csv` or `.parquet` file has its prompt in the column
    that `columns` names, else in `prompt`, `messages` or another name that training
    knows: a text, or a list of `{"role": ..., "content": ...}`, whose last message is
    not shown to the model if it is an answer. Context, system text and `id` may stand
    beside it. Any other file has a prompt in each line that is not empty.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    require_file(f"--prompts={path}", path)
    if kind_of(path) in READERS:
        for where, row in read_rows(path):
            yield _from_row(where, row, columns)
        return
    if (kind := kind_of(path)) in OTHER_ENDINGS:
        raise UserError(
            f"--prompts={path} has rows, not lines of text: rename it to end in "
            f"{OTHER_ENDINGS[kind]}"
        )
    try:
        refuse_other_content(path, is_plain=True)
        with open_bytes(path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
            yield from text_prompts(text, path.name)
    except (OSError, EOFError, zlib.error) as error:
        raise read_error(path, error) from error


def check_prompts(path: Path, columns: PromptColumns) -> None:
    """Refuses a file without prompts, and names material that no prompt has.

    Raises:
      UserError: the file cannot be read, is empty, or none of its rows is a prompt.
    """
    failed, count, contexts, unused = None, 0, 0, {}
    for prompt in read_prompts(path, columns):
        count += not prompt.problem
        contexts += bool(prompt.context.strip())
        failed = failed or (prompt if prompt.problem else None)
        unused |= {name: prompt.where for name in prompt.unused if name not in unused}
    if not count:
        why = f" in any row: {failed.where}: {failed.problem}" if failed else ""
        raise UserError(f"--prompts={path} has no prompt{why}")
    if columns.must_fill and not contexts:
        raise UserError(
            f"--context_column={columns.must_fill} is filled in no row of {path}"
        )
    for name, where in unused.items():
        logging.warning(
            "column %r is filled, as in %s, and the model does not see it: "
            "--context_column=%s adds it to the prompt",
            name,
            where,
            name,
        )


def text_prompts(lines: Iterable[str], name: str) -> Iterator[FilePrompt]:
    """The lines that are not empty, each a prompt; `name` is that of their file."""
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\n")
        if text.strip():
            where = f"{name}:{number}"
            yield FilePrompt(where, {"prompt": text}, (Turn("user", text),))


def _from_row(
    where: str, row: Mapping[str, Any] | BadRowError, columns: PromptColumns
) -> FilePrompt:
    if isinstance(row, BadRowError):
        return FilePrompt(where, {}, problem=row.detail)
    present = {name: value for name, value in row.items() if value is not None}
    name, beside = _find_pair(present, columns)
    value = present.get(name)
    is_chat = isinstance(value, list) or name in CHATS
    given = {k: present[k] for k in ("id", "prompt", "messages") if k in present}
    if not name or (name == "prompt" and "messages" in given):
        return FilePrompt(where, given, problem=_no_prompt(present, columns))
    given["messages" if is_chat else "prompt"] = value
    chat = _as_messages(value) if is_chat else [{"role": "user", "content": value}]
    names = filter(None, (beside, columns.system))
    texts = {each: present.get(each) or "" for each in names}
    if row.get("tools"):
        problem = "it has tools, which are not passed to the model here"
    else:
        problem = mismatch(
            chat if is_chat else value, MESSAGES if is_chat else str, name
        )
        wrong = (mismatch(text, str, each) for each, text in texts.items())
        problem = problem or next(filter(None, wrong), "")
    if problem:
        return FilePrompt(where, given, problem=problem)
    context, system = texts.get(beside, ""), texts.get(columns.system, "").strip()
    turns = [Turn(each["role"], each["content"]) for each in chat]
    if [turn.role for turn in turns[-2:]] == ["user", "assistant"]:
        turns.pop()  # The answer that a test file has for comparison.
    if not any(turn.text.strip() for turn in turns[-1:]) and not context.strip():
        problem = f"{name} is empty"
    elif odd := [turn.role for turn in turns if turn.role not in ROLES]:
        problem = f"{odd[0]!r} is no role; it must be one of {', '.join(ROLES)}"
    elif turns[-1].role != "user":
        problem = f"the last message is of the {turns[-1].role}; it must be the user's"
    elif system and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    used = {name, *texts, *(REQUESTS if is_chat else ())}
    unused = tuple(
        x for x in present if present[x] and x not in used and is_material(x)
    )
    return FilePrompt(where, given, tuple(turns), context, problem, unused)


def _find_pair(row: Mapping[str, Any], columns: PromptColumns) -> tuple[str, str]:
    """The row's columns of a prompt, preferably filled, and of its material, or ""."""
    found = [name for name, _ in columns.pairs if name in row]
    name = next((x for x in found if row[x] != ""), next(iter(found), ""))
    beside = [material for prompt, material in columns.pairs if prompt == name]
    return name, next((x for x in beside if row.get(x)), "")


def _no_prompt(row: Mapping[str, Any], columns: PromptColumns) -> str:
    """Why a row has no prompt or several, and the flag that names its column."""
    if "prompt" in row and "messages" in row:
        return "it has prompt and messages; it must have one of them"
    own = [name for name, _ in columns.pairs if name not in dict(USUAL.pairs)]
    near = next(filter(None, (nearest(name, row) for name in own)), "")
    is_given = len(columns.pairs) == 1
    wanted = [columns.pairs[0][0]] if is_given else [*own, "prompt", "messages"]
    likely = next((x for x in row if plain_name(x) in REQUESTS), "COLUMN")
    return (
        f"it has no column {' or '.join(wanted)}{near}, but "
        f"{', '.join(map(repr, row)) or 'nothing'}: name the prompt's column with "
        + shlex.quote(f"--prompt_column={likely}")
    )


def _as_messages(value: Any) -> Any:
    """Messages with OpenAI's names for roles and texts, where training knows others."""
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        return value
    fields = {"role": ("from", "role"), "content": ("value", "content")}
    found = [
        {k: x[n] for k, names in fields.items() for n in names if x.get(n) is not None}
        for x in value
    ]
    for each in found:
        if isinstance(role := each.get("role"), str):
            each["role"] = ROLE_NAMES.get(role, role)
    return found
