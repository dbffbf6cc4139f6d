"""Processes that fill one folder together: whose turn it is, and who has failed.

A failure is a file, so that nobody waits for work that nobody will do. All of it is
advice: a stale file, or a disk without locks, costs work that is done twice, and never
a wrong result.
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from research.core.errors import UserError

FAILED = "failed"


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


class SharedUnits:
    """The numbered units of a folder; process `i` of `n` makes each `n`-th from `i` on.

    While a process makes its units it holds the lock of `process-I-of-N`. If it fails,
    `failed-I-of-N` holds the number of the unit at which it failed.
    """

    def __init__(self, folder: Path, count: int, index: int, processes: int):
        """`count` units are made in `folder`, which exists, by `processes`."""
        self._folder, self._count = folder, count
        self._index, self._processes = index, processes
        self._retried: set[int] = set()
        self._failed_at = ""

    @contextlib.contextmanager
    def in_work(self) -> Iterator[Iterable[int]]:
        """Gives the units of this process; to be left when they are made.

        Before each of them come the units at which other processes have failed since:
        so all of them end with the same error soon, and not after the work of hours.
        """
        self._failure(self._index).unlink(missing_ok=True)
        claim = self._claim(self._index)
        with open(claim, "a+") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(_kernel())
            file.flush()
            try:
                yield self._mine()
            except Exception:
                _write(self._failure(self._index), self._failed_at)
                raise
            claim.unlink(missing_ok=True)

    def _mine(self) -> Iterator[int]:
        for unit in range(self._index, self._count, self._processes):
            yield from self.failed()
            if unit not in self._retried:
                yield unit

    @contextlib.contextmanager
    def failing_at(self, unit: int) -> Iterator[None]:
        """Notes that an error which the body raises is one of `unit`."""
        try:
            yield
        except Exception:
            self._failed_at = str(unit)
            raise

    def failed(self) -> list[int]:
        """Units at which other processes have failed; each is given once."""
        found = []
        for path in sorted(self._folder.glob(f"{FAILED}-*")):
            with contextlib.suppress(OSError, ValueError):
                unit = int(path.read_bytes())
                if 0 <= unit < self._count and unit not in self._retried:
                    found.append(unit)
                    self._retried.add(unit)
        return found

    def is_abandoned(self, unit: int) -> bool:
        """Whether the process of `unit` has failed, or was killed on this machine."""
        owner = unit % self._processes
        if owner == self._index or self._failure(owner).exists():
            return True
        try:
            with open(self._claim(owner)) as file:
                # A disk may share its files with other machines, and not its locks.
                if file.read() != _kernel() or not _kernel():
                    return False
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except OSError:  # Not there, locked, or on a disk without locks.
            return False

    def clear(self) -> None:
        """Removes all files about processes; the folder is finished."""
        for pattern in ("process-*", f"{FAILED}-*"):
            for path in self._folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _claim(self, index: int) -> Path:
        return self._folder / f"process-{index}-of-{self._processes}"

    def _failure(self, index: int) -> Path:
        return self._folder / f"{FAILED}-{index}-of-{self._processes}"


@functools.cache
def _kernel() -> str:
    """Tells one boot of one machine from all others; empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _write(mark: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # A full disk stops the others, too.
        mark.write_text(text, encoding="utf-8", errors="backslashreplace")


def _seen(mark: Path) -> tuple[int, str] | None:
    """When the file was written, and its text; None where there is none."""
    try:
        return os.stat(mark).st_mtime_ns, mark.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
