"""Ends a process that hangs by itself, or because another process is dead or stuck.

If one process is dead or stuck, the others wait in a collective that never ends. No
exception can be raised there, so a thread watches the clock.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from research.core.errors import STUCK
from research.runs.phase_timer import PhaseTimer

PATIENCE = 5.0  # seconds in which the cause must be recorded


class Watchdog:
    """Watches a run within its `with` block, and ends the process if it hangs."""

    def __init__(
        self, phases: PhaseTimer, limit: float, rank: int, record: Callable[[str], None]
    ):
        """Args:
        phases: gives the signs of life.
        limit: seconds without a sign of life; 0 turns the watchdog off.
        rank: index of this process.
        record: called with the cause before the process ends.
        """
        self._phases = phases
        self._limit = limit
        self._rank = rank
        self._record = record
        self._leave = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def __enter__(self) -> "Watchdog":
        if self._limit:
            self._phases.sign_of_life()
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._leave.set()

    def _watch(self) -> None:
        interval = min(1.0, self._limit / 10)
        before = time.monotonic()
        while not self._leave.wait(interval):
            now = time.monotonic()
            # The whole process was suspended (closed laptop, SIGSTOP): not a hang.
            if now - before > interval + self._limit / 2:
                self._phases.sign_of_life()
            before = now
            if self._phases.silence > self._limit:
                self._end()

    def _end(self) -> None:
        cause = (
            f"process {self._rank} has hung in phase {self._phases.name!r} for more "
            f"than config.runtime.watchdog_s={self._limit:g} s"
        )
        sys.stderr.write(f"error: {cause}; its threads are here:\n")
        # Not straight into standard error, whose reader may hang as well.
        with open(os.memfd_create("stacks"), "w+") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            sys.stderr.write(stacks.read())
        sys.stderr.write(
            "the same command resumes the run from the last checkpoint; a longer "
            "--config.runtime.watchdog_s gives slow steps more time\n"
        )
        sys.stderr.flush()
        # The cause may be a disk that hangs, and it would block this thread, too.
        recorder = threading.Thread(
            target=self._record_cause, args=(cause,), daemon=True
        )
        recorder.start()
        recorder.join(PATIENCE)
        os._exit(STUCK)  # Only this ends a thread that waits in C++.

    def _record_cause(self, cause: str) -> None:
        try:
            self._record(cause)
        except Exception as error:  # For example, the disk is full.
            logging.error("the cause could not be recorded: %s", error)
