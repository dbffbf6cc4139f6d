"""Conversations: a file of lines each, to which lines are added and never changed.

So two tabs, a reload and a studio that ends can lose nothing that was sent. A `turn` is
what a person wrote, `answers` are what the models said to it at one time, side by side.
A turn follows one of the answers, by `parent` and `chosen`, or nothing: an edited turn
is another one with the same parent, and answers that are made again are others to the
same turn. A `pick` is the answer with which people continue, and `scores` are the
log-probabilities of the ids of an answer, under its model and its base. Together they
are a tree, and a conversation is one way down.
"""

import dataclasses
import fcntl
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.json_files import NUMBER, mismatch, read_json_lines
from research.runs.utc_clock import utc_now
from research.studio.page_errors import PageError, not_found

ID = re.compile(r"[0-9a-f]{12}")
LARGEST = 32 << 20  # bytes of a conversation
TITLE = 60  # letters
FIRST_LINE = 1 << 20  # bytes
TOKEN = {"text": str, "logprob": NUMBER}
COLUMN = {"model": str, "text": str, "ids": [int], "tokens": [TOKEN], "stamp": {}}
# Each kind of line must hold this beside its `kind`, `id` and `time`.
KINDS: dict[str, dict[str, Any]] = {
    "turn": {"parent": str, "chosen": str, "text": str, "context": str, "system": str},
    "answers": {"turn": str, "server": str, "settings": {}, "columns": [COLUMN]},
    "pick": {"answers": str, "model": str},
    "scores": {"answers": str, "model": str, "own": [NUMBER], "base": [NUMBER]},
}
LINE = {"kind": str, "id": str, "time": str}


@dataclasses.dataclass(frozen=True)
class KeptChat:
    """A conversation as its file tells it.

    Attributes:
      id: of its file.
      lines: in the order in which they were written.
      bad: numbers of lines that are none.
    """

    id: str
    lines: tuple[dict[str, Any], ...]
    bad: tuple[int, ...] = ()

    def line(self, kind: str, name: str) -> dict[str, Any]:
        """A line by its id. Raises UserError: there is none of this kind."""
        for line in self.lines:
            if (line["kind"], line["id"]) == (kind, name):
                return line
        raise UserError(f"this conversation has no {kind} {name[:40]!r}")

    def way_to(
        self, answers: str, model: str
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Each turn with the answer that was taken, from the first to this answer.

        Args:
          answers: id of the last answers; "" for a way that has none.
          model: the column that is taken of them.

        Raises:
          UserError: the file does not hold the way.
        """
        way: list[tuple[dict[str, Any], dict[str, Any]]] = []
        while answers:
            found = self.line("answers", answers)
            columns = {x["model"]: x for x in found["columns"]}
            if model not in columns or len(way) > len(self.lines):
                raise UserError(f"answers {answers} have none of {model[:80]!r}")
            turn = self.line("turn", found["turn"])
            way.append((turn, columns[model]))
            answers, model = turn["parent"], turn["chosen"]
        return way[::-1]


def messages_of(
    way: list[tuple[dict[str, Any], dict[str, Any]]], asked: Mapping[str, Any]
) -> tuple[list[dict[str, str]], str]:
    """The messages that put the turn `asked` to a model, and the context with them.

    The first turn of the way has the system text and the context of all of it.
    """
    first = way[0][0] if way else asked
    found = [{"role": "system", "content": first["system"]}] if first["system"] else []
    for turn, answer in way:
        found.append({"role": "user", "content": turn["text"]})
        found.append({"role": "assistant", "content": answer["text"]})
    return [*found, {"role": "user", "content": asked["text"]}], first["context"]


class Conversations:
    """The conversations of a folder, which is made with the first one."""

    def __init__(self, folder: Path):
        self._folder = folder

    def all(self) -> list[tuple[str, float]]:
        """Id and time of the last change, the newest first."""
        try:
            entries = [*os.scandir(self._folder)]
        except FileNotFoundError:
            return []
        found = [
            (entry.name.removesuffix(".jsonl"), entry.stat().st_mtime)
            for entry in entries
            if entry.name.endswith(".jsonl")
            and ID.fullmatch(entry.name.removesuffix(".jsonl"))
            and entry.is_file(follow_symlinks=False)
        ]
        return sorted(found, key=lambda each: -each[1])

    def title(self, name: str) -> str:
        """The beginning of the first turn; the rest of the file is not read."""
        with open(self._path(name), "rb") as file:
            try:
                first = json.loads(file.readline(FIRST_LINE))["text"]
                words = " ".join(first.split())
            except (ValueError, KeyError, TypeError, AttributeError):
                return "a long one, or damaged"
        return f"{words[:TITLE]}..." if len(words) > TITLE else words or "empty"

    def read(self, name: str) -> KeptChat:
        """A conversation. Raises PageError: there is none of this name."""
        path = self._path(name)
        if not path.is_file():
            raise not_found(f"there is no conversation {name[:40]!r}")
        values, bad = read_json_lines(path, LINE)
        lines = [x for x in values if not mismatch(x, KINDS.get(x["kind"], {}))]
        return KeptChat(name, tuple(lines), tuple(bad))

    def add(self, name: str, line: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Appends a line; returns the conversation's id and the line as it is kept.

        Args:
          name: of the conversation; "" makes a new one.
          line: with its `kind`, and what `KINDS` has for it.

        Raises:
          PageError: 400 it is no line; 404 there is no such conversation; 413 the
            conversation is too long.
        """
        kind = line.get("kind")
        shape = KINDS.get(kind) if isinstance(kind, str) else None
        problem = mismatch(dict(line), shape) if shape else "its kind is unknown"
        if problem:
            raise PageError(400, f"this is no line of a conversation: {problem}")
        path = self._path(name) if name else None
        if path and not path.is_file():
            raise not_found(f"there is no conversation {name[:40]!r}")
        name = name or secrets.token_hex(6)
        kept = {**line, "id": secrets.token_hex(6), "time": utc_now()}
        written = json.dumps(kept).encode() + b"\n"
        self._folder.mkdir(parents=True, exist_ok=True)
        append_lines(self._path(name), written, LARGEST)
        return name, kept

    def remove(self, name: str) -> None:
        """Moves a conversation to `.trash`. Raises PageError: there is none."""
        path = self._path(name)
        if not path.is_file():
            raise not_found(f"there is no conversation {name[:40]!r}")
        trash = self._folder / ".trash"
        trash.mkdir(exist_ok=True)
        path.replace(trash / path.name)

    def _path(self, name: str) -> Path:
        if not ID.fullmatch(name):
            raise not_found(f"{name[:40]!r} is no conversation")
        return self._folder / f"{name}.jsonl"


def append_lines(path: Path, written: bytes, limit: int) -> None:
    """Appends whole lines to a file, also where its last one was torn.

    Raises:
      PageError: 413 the file would have more than `limit` bytes.
      OSError: it cannot be written.
    """
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        if size + len(written) > limit:
            raise PageError(413, f"{path.name} would have over {limit:,} bytes")
        if size:
            file.seek(-1, os.SEEK_END)
            written = written if file.read(1) == b"\n" else b"\n" + written
        file.write(written)
        file.flush()
        os.fsync(file.fileno())
