"""The keys that let a client in, and what each allows."""

import dataclasses
import hashlib
import hmac
import logging
import stat
from pathlib import Path
from typing import Literal

from research.core.errors import UserError

Role = Literal["user", "admin"]
SHORTEST_KEY = 16  # characters: a shorter one could be guessed


@dataclasses.dataclass(frozen=True)
class ApiKeys:
    """The keys of a file, one a line; `admin KEY` may also change the adapters.

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
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            role: Role = "admin" if words[0] == "admin" and words[1:] else "user"
            if len(words) != 1 + (role == "admin") or len(words[-1]) < SHORTEST_KEY:
                raise UserError(
                    f"{where}:{number}: a line must be KEY or admin KEY, and a key at "
                    f"least {SHORTEST_KEY} characters without blanks; make one with "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
            found.append((_digest(words[-1].encode()), role))
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
        given, role = _digest(key.strip()), None
        for known, allowed in self.digests:
            if hmac.compare_digest(known, given):
                role = allowed
        return role if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
