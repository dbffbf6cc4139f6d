"""Standard output and error that a command can always write to.

A terminal closes or stops, `| head` has read enough, a disk is full, a console lacks a
character: none of this may end or hold a training. Text that cannot be written is
dropped.
"""

import contextlib
import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any


class _LossyFile(io.FileIO):
    """A file descriptor whose writes never fail.

    Attributes:
      failure: the first error of a write; None if nothing was dropped.
    """

    failure: OSError | None = None

    def __init__(self, number: int, patience: float | None):
        """`patience`: seconds that a reader may hold a write; None: no limit."""
        super().__init__(number, "w", closefd=False)
        self._patience = self._now = patience
        self._ready = select.poll()
        self._ready.register(number, select.POLLOUT)

    def write(self, data: Any) -> int:
        try:
            # A pipe that is ready takes this much without waiting.
            written = super().write(data[: select.PIPE_BUF]) if self._waits() else None
        except OSError as error:
            self.failure = self.failure or error
            written = None
        if written is None:
            self.failure = self.failure or OSError(errno.EAGAIN, "nobody reads it")
            return len(data)
        return written

    def _waits(self) -> bool:
        """Waits until a write would not wait; False if that takes too long."""
        limit = None if self._now is None else 1000 * self._now
        ready = bool(self._ready.poll(limit))
        # A reader that has stopped is not waited for at every line.
        self._now = self._patience if ready else 0.0
        return ready


def keep_open(patience: float | None = None) -> None:
    """Makes writes to `sys.stdout` and `sys.stderr` succeed, whatever is behind them.

    Standard streams that the caller has closed lead to the null device, so no file of
    a run gets their numbers. Streams that something else has replaced stay as they are.

    Args:
      patience: seconds that a reader may keep a write waiting before text is dropped;
        None waits without a limit.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Gets the lowest free number.
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue
        lossy = io.TextIOWrapper(
            io.BufferedWriter(_LossyFile(number, patience)),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=not before or before.line_buffering or before.write_through,
        )
        setattr(sys, name, lossy)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Drops lines of the log that repeat in the block, as of files opened twice."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        return not (line in said or said.add(line))

    logging.getLogger().addFilter(is_new)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_new)


def lost_output() -> OSError | None:
    """Why text for standard output was dropped; None if none was."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _LossyFile) else None
