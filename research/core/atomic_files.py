"""Durable writes, for all rooms: a file is complete and on disk, or it is not there.

A power loss may take the bytes of a file since its last sync, and the names in a folder
since the last sync of that folder. So whoever publishes a file or folder by its name
syncs first what is below the name, and the folder with the name after it.
"""

import contextlib
import fcntl
import os
import re
import uuid
from pathlib import Path
from typing import Any

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")

# Ends of the names of folders that are not complete yet, or are no longer in use.
PARTIAL, REPLACED = ".partial", ".replaced"


def write_whole(path: Path, content: bytes | bytearray | str) -> None:
    """Writes a file that others see complete or not at all, even after a power loss.

    The file is synced before the rename that publishes it, the folder after it.

    Args:
      path: replaced if it exists.
      content: bytes, or text that is written as UTF-8.

    Raises:
      OSError: no space or no permission; `path` is then as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                if not _claim(file, temporary):
                    continue
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            sync(path.parent)
            return
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a power loss.

    Raises:
      OSError: the file could not be written to the disk.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        # Some network file systems cannot sync a folder, and some folders may be
        # written but not opened.
        if not path.is_dir():
            raise


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, where they are missing, for good."""
    missing = [x for x in (path, *path.parents) if not x.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Renames a folder in which all is synced; the name `final` is free.

    Raises:
      OSError: `final` is taken, or the file system refuses.
    """
    temporary.rename(final)
    sync(final.parent)


def intended_name(path: Path) -> str:
    """The name that a temporary file of `write_whole` was to get, or `path.name`."""
    found = TEMPORARY.fullmatch(path.name)
    return found["name"] if found else path.name


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files whose writer is dead.

    A writer locks its temporary file. The system releases the lock when the writer
    dies, however it dies.
    """
    for path in folder.glob(".*.tmp"):
        if not TEMPORARY.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def _claim(file: Any, path: Path) -> bool:
    """Locks a new file; False if a clean-up removed it before it was locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # This file system has no locks, so nobody cleans up either.
    return path.exists() and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
