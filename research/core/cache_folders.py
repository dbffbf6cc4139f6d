"""The folder for files that can be made again, and the end of those nobody uses."""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
import uuid
from pathlib import Path

from research.core.atomic_files import make_folder

# In each entry: its time is that of the last start that used it, and a process that
# uses the entry holds its lock.
USED = "used"
KEPT_DAYS = 90
REMOVED = ".removed"  # The ending of an entry that is being removed.
# File descriptors of marks, open until this process ends.
_held: dict[Path, int] = {}
# Two threads would close one descriptor twice, the second time another file's.
_marking = threading.Lock()


def user_cache() -> Path:
    """`research` in the user's cache folder. The folder may not exist yet.

    Raises:
      FileNotFoundError: the user has no home folder, as in some containers.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error
    return Path(home) / "research"


def use_entry(entry: Path) -> None:
    """Makes the folder of an entry, and keeps it from `sweep` until this process ends.

    An entry that is there and must not be written to is used without a mark.

    Raises:
      OSError: the folder cannot be made.
    """
    with _marking:
        while not _is_held(entry):
            make_folder(entry)
            try:
                mark = os.open(
                    entry / USED, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666
                )
            except OSError:
                return
            with contextlib.suppress(OSError):  # A disk without locks keeps all.
                fcntl.flock(mark, fcntl.LOCK_SH)
            if entry in _held:
                os.close(_held[entry])
            _held[entry] = mark
    with contextlib.suppress(OSError):
        os.utime(entry / USED)


def sweep(entries: Path) -> None:
    """Removes the entries that no start has used for `KEPT_DAYS`, and says so.

    `entries` is a folder with a folder for each entry. One that a process of this
    machine uses stays, whatever its age, and so do all on a disk without locks.
    """
    with contextlib.suppress(OSError):
        for entry in [x for x in entries.iterdir() if x.is_dir()]:
            with contextlib.suppress(OSError):
                _remove_if_old(entry)


def _remove_if_old(entry: Path) -> None:
    if entry.name.endswith(REMOVED):  # Its removal was cut short.
        shutil.rmtree(entry)
        return
    mark = entry / USED
    last = os.stat(mark if mark.exists() else entry).st_mtime
    days = (time.time() - last) / 86400
    if days < KEPT_DAYS:
        return
    with open(mark, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = entry.with_name(f".{uuid.uuid4().hex}{REMOVED}")
        entry.rename(gone)
    size = sum(os.lstat(path).st_size for path in gone.rglob("*"))
    shutil.rmtree(gone)
    logging.info(
        "cache: removed %s (%.1f MB), which no run has used for %d days",
        entry, size / 1e6, days,
    )  # fmt: skip


def _is_held(entry: Path) -> bool:
    """Whether this process holds the mark that is in the entry now."""
    try:
        ours, now = os.fstat(_held[entry]), os.stat(entry / USED)
    except (KeyError, OSError):
        return False
    return (ours.st_dev, ours.st_ino) == (now.st_dev, now.st_ino)
