"""Files that a browser sends, streamed to disk whatever their size."""

import contextlib
import dataclasses
import hashlib
import os
import uuid
from pathlib import Path

from starlette.requests import Request

from research.studio.page_errors import PageError

LARGEST = 20 << 30  # bytes


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file that has arrived whole."""

    path: Path
    size: int
    sha256: str


def plain_name(written: str) -> str:
    """The name of a file without folders. Raises PageError: it is none."""
    if written in ("", ".", "..") or written.startswith("."):
        raise PageError(400, f"{written!r} is no name for a file")
    if any(letter in "/\\\0" or not letter.isprintable() for letter in written):
        raise PageError(400, f"{written[:80]!r} is no name for a file")
    if len(written.encode()) > 200:
        raise PageError(400, "the name of the file is over 200 bytes")
    return written


async def receive_upload(
    request: Request, folder: Path, name: str, limit: int = LARGEST
) -> Upload:
    """Writes the raw body of a request (`PUT`) to a new file.

    The file has its name only when it is whole; nothing of a broken upload stays.

    Raises:
      PageError: 409 the name is taken; 413 more than `limit` bytes; 400 no name.
      ClientDisconnect: the client is gone.
      OSError: the disk is full.
    """
    target = folder / plain_name(name)
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise PageError(413, f"the file has {int(said):,} bytes, at most {limit:,}")
    if os.path.lexists(target):
        raise PageError(409, f"{name} is there already: rename the file")
    temporary = folder / f".{uuid.uuid4().hex}.upload"
    size, digest = 0, hashlib.sha256()
    try:
        with temporary.open("xb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise PageError(413, f"the file has over {limit:,} bytes")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)  # Unlike a rename, it replaces nothing.
        except FileExistsError as error:
            raise PageError(409, f"{name} is there already") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return Upload(target, size, digest.hexdigest())
