"""A conversation as a training row, and files of such rows below `--data`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.studio.chats.conversation_files import append_lines, messages_of
from research.studio.roots import Roots
from research.studio.uploads import plain_name

LARGEST = 1 << 30  # bytes of a file to which rows are added
CATEGORY = "chat"


def row_of(way: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """The line of a row, by the columns that a training reads without a setting.

    One turn becomes `instruction`, `context` and `response`; a longer conversation
    `messages`, since a later answer rests on the turns before it. A context stands
    there in the first message, as templates join the two.

    Args:
      way: each turn and its answer, of `KeptChat.way_to`.

    Raises:
      UserError: there is no answer yet, or an empty one.
    """
    if not way or not all(answer["text"].strip() for _, answer in way):
        raise UserError("a row needs an answer to each turn, and one is empty")
    (first, answer), system = way[0], way[0][0]["system"]
    row: dict[str, Any]
    if len(way) == 1:
        row = {
            "instruction": first["text"],
            "context": first["context"],
            "response": answer["text"],
        }
        row |= {"system": system} if system else {}
    else:
        messages, context = messages_of([*way[:-1]], way[-1][0])
        if context:
            asked = next(x for x in messages if x["role"] == "user")
            asked["content"] += f"\n\n{context}"
        row = {"messages": [*messages, _said(way[-1][1]["text"])]}
    return json.dumps(row | {"category": CATEGORY}, ensure_ascii=False) + "\n"


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def append_row(roots: Roots, name: str, row: str) -> Path:
    """Appends a row to a `.jsonl` file below the roots, which is made if need be.

    Args:
      roots: those of `--data`.
      name: `data/mine.jsonl`, or `mine.jsonl` in the first root.
      row: of `row_of`.

    Raises:
      PageError: 400 a name in it is none; 403 the path leads out; 413 the file is
        too long.
      UserError: it is no `.jsonl` file, or its folder is not there.
    """
    top, *below = [plain_name(part) for part in name.split("/")]
    folder = roots.folders.get(top) if below else roots.first
    if folder is None or not name.endswith(".jsonl"):
        raise UserError(
            f"{name[:120]!r} is no file for rows: write NAME.jsonl, or one below "
            f"{', '.join(f'{x}/' for x in roots.folders)}"
        )
    path = roots.require_inside(folder.joinpath(*below or [top]))
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(f"{name[:120]}: its folder is not there; make it first")
    append_lines(path, row.encode(), LARGEST)
    return path
