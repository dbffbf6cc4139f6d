"""The signals that ask a command to stop, and to be started again later."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from research.core.errors import PREEMPTED


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP unless this process was told to ignore it, as by `nohup`."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, signal.SIGHUP]


def resume_after_signals() -> None:
    """Makes SIGTERM and SIGHUP end this process at once, as a resumable stop.

    Imports and the search for other processes take many seconds in which there is
    nothing to save. Code that has something to save installs its own handler later.
    """
    for number in stop_signals():
        signal.signal(number, _end)


@contextlib.contextmanager
def unwinding_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, which then removes its files.

    Where this is not the main thread, signals keep their meaning.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None is a handler that Python has not made.
    before = {x: signal.signal(x, _unwind) or signal.SIG_DFL for x in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind(number: int, frame: object) -> None:
    for each in stop_signals():
        signal.signal(each, signal.SIG_IGN)  # The first one is enough.
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name}; the same command begins again\n".encode())
    sys.exit(PREEMPTED)


def _end(number: int, frame: object) -> None:
    message = (
        f"stopped by {signal.Signals(number).name} outside of training; the same "
        "command resumes the run\n"
    )
    # No buffered stream: the signal may have come within a write to one.
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(PREEMPTED)
