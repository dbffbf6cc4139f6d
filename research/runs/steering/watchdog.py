"""Ends a process that hangs: itself, or in waiting for another one that is gone.

A dead process leaves the others in a collective that never ends, and a stuck one,
too. No exception can be raised there, so a thread looks at the clock.
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

PATIENCE = 5.0  # seconds that the cause may take to be written down


class Watchdog:
    """Watches `phases` while it is entered."""

    def __init__(
        self, phases: PhaseTimer, limit: float, rank: int, told: Callable[[str], None]
    ):
        """Args:
        phases: what gives the signs of life.
        limit: seconds without one; 0 watches nothing.
        rank: of this process.
        told: called with what happened before the end.
        """
        self._phases = phases
        self._limit = limit
        self._rank = rank
        self._told = told
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
            # The whole process stood still: a closed laptop, a SIGSTOP. Not a hang.
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
        sys.stderr.write(f"error: {cause}; this is where its threads are:\n")
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.write(
            "the same command resumes the run from the last checkpoint; a longer "
            "--config.runtime.watchdog_s gives slow steps more time\n"
        )
        sys.stderr.flush()
        # A disk that hangs may be the cause, and would hold this thread up, too.
        telling = threading.Thread(target=self._tell, args=(cause,), daemon=True)
        telling.start()
        telling.join(PATIENCE)
        os._exit(STUCK)  # Nothing else ends a thread that waits in C++.

    def _tell(self, cause: str) -> None:
        try:
            self._told(cause)
        except Exception as error:  # Of a disk that is full, say.
            logging.error("and this could not be written down: %s", error)
