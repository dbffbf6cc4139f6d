"""Processes that fill one folder together: whose turn it is, and who has failed.

A failure is seen on the disk, so that nobody waits for work that nobody will do. All of
it is advice: a stale file, or a disk without locks, costs work that is done twice, and
never a wrong result.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from research.core.errors import UserError

FAILED = "failed"
SECONDS_BETWEEN_LOOKS = 1.0  # at the claims of other processes


@contextlib.contextmanager
def one_at_a_time(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of `folder`; the system frees the lock of a process that died.

    On a disk without locks nobody waits, so each process does the work.

    Args:
      folder: exists.
      waiting: called before a wait.

    Raises:
      UserError: the process that this one waited for raised it.
    """
    mark = folder / FAILED
    before = _seen(mark)
    with open(folder / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
            if (now := _seen(mark)) not in (None, before):
                raise UserError(now[1]) from None
        except OSError:
            pass
        try:
            yield
        except UserError as error:
            _write(mark, str(error))
            raise
        mark.unlink(missing_ok=True)


class UnitClaims:
    """Which process makes which numbered unit of a folder.

    A process claims a unit, makes it, and frees it. The claim is a locked file below
    `claims/` that names the boot of its machine. A process that fails empties its
    claims, and the system frees the locks of one that was killed; the units of both are
    taken first by the others, so that all meet the same error soon, and not after the
    work of hours. Processes that see other disks claim all units of their own.
    """

    def __init__(self, folder: Path, count: int, finished: Callable[[int], bool]):
        """`count` units are made in `folder`, which exists."""
        self._folder, self._count, self._finished = folder / "claims", count, finished
        self._held: dict[int, BinaryIO] = {}
        self._look_again = 0.0
        self._folder.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        for unit in tuple(self._held):
            self.free(unit, given_up=True)

    def take(self, units: Iterable[int], *, alone: bool = False) -> Iterator[int]:
        """Claims and yields those of `units` that are unfinished and nobody makes.

        Units that others have given up come first.

        Args:
          alone: also those that another machine claims.
        """
        for unit in units:
            yield from filter(self._claim, self._claimed_by_others())
            if self._claim(unit, alone=alone):
                yield unit

    def free(self, unit: int, *, given_up: bool = False) -> None:
        """Ends the claim of a unit that is finished, or that others should make."""
        with contextlib.suppress(OSError), self._held.pop(unit) as file:
            if given_up:
                file.truncate(0)
            else:
                self._path(unit).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all claims; the folder is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _claimed_by_others(self) -> list[int]:
        if time.monotonic() < self._look_again:
            return []
        self._look_again = time.monotonic() + SECONDS_BETWEEN_LOOKS
        names = {name for name in os.listdir(self._folder) if name.isdecimal()}
        return sorted({int(n) for n in names if int(n) < self._count} - {*self._held})

    def _claim(self, unit: int, *, alone: bool = False) -> bool:
        if self._finished(unit):
            return False
        file = self._path(unit).open("a+b")  # Closed by `free`.
        if self._is_free(file, alone):
            # Another process may have finished the unit and freed it meanwhile.
            if not self._finished(unit):
                file.truncate(0)
                file.write(_boot())
                file.flush()
                self._held[unit] = file
                return True
            self._path(unit).unlink(missing_ok=True)
        file.close()
        return False

    def _is_free(self, file: BinaryIO, alone: bool) -> bool:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # A disk without locks.
            return alone or not file.read()
        # A disk may share its files with other machines, and not its locks.
        return alone or file.read() in (b"", _boot())

    def _path(self, unit: int) -> Path:
        return self._folder / str(unit)


@functools.cache
def _boot() -> bytes:
    """Tells one boot of one machine from all others; random where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return uuid.uuid4().bytes


def _write(mark: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # A full disk stops the others, too.
        mark.write_text(text, encoding="utf-8", errors="backslashreplace")


def _seen(mark: Path) -> tuple[int, str] | None:
    """When the file was written, and its text; None where there is none."""
    try:
        return os.stat(mark).st_mtime_ns, mark.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
