"""The keys that let a client in, and what each allows."""

import dataclasses
import hashlib
import hmac
import logging
import re
import stat
from pathlib import Path
from typing import Literal

from research.core.errors import UserError

Role = Literal["user", "admin"]
SHORTEST_KEY = 16  # characters: a shorter one could be guessed
HASHED = re.compile(r"sha256:([0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class ApiKeys:
    """The keys of a file, one a line; `admin KEY` may also change the adapters.

    In place of a key, `sha256:` and its digest let the same client in, and nobody can
    read the key from the file. A comment follows ` #`.

    Attributes:
      digests: sha256 of each key, with what it allows; empty if none is needed.
    """

    digests: tuple[tuple[bytes, Role], ...] = ()

    @classmethod
    def from_file(cls, path: Path, flag: str = "--api_key_file") -> "ApiKeys":
        """Reads the file of `flag`. Raises UserError: it cannot be used."""
        try:
            text = path.read_text(encoding="utf-8")
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise UserError(f"{flag}={path} cannot be read: {error}") from error
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            logging.warning("%s can be read by other users: chmod 600 it", path)
        return cls.from_text(text, f"{flag}={path}")

    @classmethod
    def from_text(cls, text: str, where: str) -> "ApiKeys":
        """The keys in the text of a file. Raises UserError: they cannot be used."""
        found: list[tuple[bytes, Role]] = []
        for number, line in enumerate(text.splitlines(), start=1):
            words = f" {line}".partition(" #")[0].split()
            if not words:
                continue
            role: Role = "admin" if words[0] == "admin" and words[1:] else "user"
            if len(words) != 1 + (role == "admin") or len(words[-1]) < SHORTEST_KEY:
                raise UserError(
                    f"{where}:{number}: a line must be KEY or admin KEY, and a key at "
                    f"least {SHORTEST_KEY} characters without blanks; make one with "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
            hashed = HASHED.fullmatch(words[-1])
            if words[-1].startswith("sha256:") and not hashed:
                raise UserError(f"{where}:{number}: sha256: needs 64 digits of 0-9 a-f")
            known = bytes.fromhex(hashed[1]) if hashed else digest(words[-1].encode())
            found.append((known, role))
        if not found:
            raise UserError(f"{where} holds no key; write one a line")
        return cls(tuple(found))

    def role(self, header: bytes) -> Role | None:
        """The rights that the header `Authorization` gives; None: no rights.

        The time depends on the number of keys alone. A digest is compared, so that not
        even the length of a key shows.
        """
        if not self.digests:
            return "admin"
        scheme, _, key = header.partition(b" ")
        given, role = digest(key.strip()), None
        for known, allowed in self.digests:
            if hmac.compare_digest(known, given):
                role = allowed
        return role if scheme.lower() == b"bearer" else None


def digest(key: bytes) -> bytes:
    """The sha256 by which a key is known."""
    return hashlib.sha256(key).digest()


class KeyFile:
    """The keys of a file as they are now: it is read again when it has changed.

    A file that is gone or damaged lets nobody in until it can be read.
    """

    def __init__(self, path: Path, flag: str = "--api_key_file"):
        """Raises UserError: the file cannot be used."""
        self._path, self._flag = path, flag
        self._seen = _mark(path)
        self._keys = ApiKeys.from_file(path, flag)

    @property
    def digests(self) -> tuple[tuple[bytes, Role], ...]:
        """Those of `ApiKeys`, and never empty."""
        if (mark := _mark(self._path)) != self._seen:
            self._seen = mark
            try:
                self._keys = ApiKeys.from_file(self._path, self._flag)
            except UserError as error:
                logging.warning("%s; until then nobody is let in", error)
                self._keys = NOBODY
        return self._keys.digests

    def role(self, header: bytes) -> Role | None:
        """That of `ApiKeys`."""
        return ApiKeys(self.digests).role(header)


# A digest that no key has.
NOBODY = ApiKeys(((b"", "user"),))


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
