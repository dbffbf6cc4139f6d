"""Files on disk: opened whatever they are compressed with, written all or nothing."""

import contextlib
import fcntl
import os
import uuid
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


def write_whole(path: Path, data: bytes | bytearray) -> None:
    """Writes a file that is seen by others complete and on disk, or not at all.

    Raises:
      OSError: no space or no permission.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            with open(temporary, "wb") as file:
                if not _claim(file, temporary):
                    continue
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                return
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """The names in a folder are on disk, too, after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some network file systems cannot.
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files whose writer is gone.

    A writer holds a lock on its file, and the lock dies with it however it dies.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def _claim(file: Any, path: Path) -> bool:
    """Locks a fresh file; False where a clean-up came between making and locking."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # Nothing can be locked here, so nobody cleans up, either.
    return path.exists() and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
