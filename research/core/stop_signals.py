"""The signals that ask a training to stop, and to be resumed later."""

import contextlib
import os
import signal

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


def _end(number: int, frame: object) -> None:
    message = (
        f"stopped by {signal.Signals(number).name} outside of training; the same "
        "command resumes the run\n"
    )
    # No buffered stream: the signal may have come within a write to one.
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(PREEMPTED)
