"""Keys of a server: each is made here, shown once, and kept as a digest with a name."""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.serve.http.access_keys import ApiKeys, Role, digest

NAME = re.compile(r"[\w .@-]{1,60}")
SHOWN = 12  # digits of a digest that name a key


@dataclasses.dataclass(frozen=True)
class KeyLine:
    """A line of a key file.

    Attributes:
      id: the beginning of the key's digest.
      role: what it allows.
      said: the comment of its line: its name, and when it was made.
      is_own: whether the key itself is in the file, so that the studio can use it.
    """

    id: str
    role: Role
    said: str
    is_own: bool


def read_keys(file: Path) -> list[KeyLine]:
    """The keys of a file in their order. Raises UserError: it cannot be used."""
    return [line for line, _ in _lines(file) if line]


def _lines(file: Path) -> list[tuple[KeyLine | None, str]]:
    """Each line, with the key in it; None for a line without one."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    found: list[tuple[KeyLine | None, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words, _, said = f" {line}".partition(" #")
        if not words.strip():
            found.append((None, line))
            continue
        ((known, role),) = ApiKeys.from_text(line, f"{file}, line {number}").digests
        is_own = not words.split()[-1].startswith("sha256:")
        key = KeyLine(known.hex()[:SHOWN], role, said.strip(), is_own)
        found.append((key, line))
    return found


def make_key(file: Path, name: str, role: Role) -> str:
    """Adds a key to a file and returns it; it cannot be read again.

    Raises:
      UserError: the name cannot be used, or the file.
      OSError: the file cannot be written.
    """
    if not NAME.fullmatch(name) or not name.strip():
        raise UserError(
            "name the key by whom it is for, with at most 60 letters, digits, blanks "
            "and _.@-"
        )
    if role not in ("user", "admin"):
        raise UserError(f"{role[:20]!r}: a key is of a user or of an admin")
    key = secrets.token_urlsafe(32)
    begin = "admin " if role == "admin" else ""
    known, day = digest(key.encode()).hex(), datetime.date.today()
    with _changing(file) as lines:
        lines.append(f"{begin}sha256:{known} # {name.strip()}, made {day}")
    return key


def remove_key(file: Path, id: str) -> KeyLine:
    """Removes a key: the server lets it in no more from its next request on.

    Raises:
      UserError: there is no such key, or it is the one that the studio uses.
      OSError: the file cannot be written.
    """
    with _changing(file) as lines:
        for place, (key, _) in enumerate(_lines(file)):
            if key and key.id == id:
                if key.is_own:
                    raise UserError("the studio itself uses this key, so it stays")
                del lines[place]
                return key
    raise UserError("this key is not there any more")


@contextlib.contextmanager
def _changing(file: Path) -> Iterator[list[str]]:
    """Gives the lines to one thread or process at a time, then writes them."""
    with open(file.with_name(f".{file.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = [line for _, line in _lines(file)]
        yield lines
        before = os.umask(0o077)  # The file that replaces it is for this user alone.
        try:
            write_whole(file, "".join(f"{line}\n" for line in lines))
        finally:
            os.umask(before)
