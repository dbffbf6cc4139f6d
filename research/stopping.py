"""Signals: SIGTERM and the first Ctrl-C ask a run to stop, the second makes it.

In the training loop a signal is noted, and the run stops between two steps. While a
lone process waits for data, or does anything outside the loop, it is raised at once.
Several processes must agree on the step they stop at: JAX's preemption service tells
all of them of a SIGTERM that reached one, and picks the step.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from research.phases import Phases

INTERRUPTED = 130  # 128 + SIGINT, as shells say it.


class Preempted(KeyboardInterrupt):
    """Raised in the main thread by a signal; no `except Exception` catches it."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number


class StopRequest:
    """Listens while it is entered."""

    def __init__(self, phases: Phases):
        self._phases = phases
        self._alone = jax.process_count() == 1
        self._noting = False
        self._before: dict[signal.Signals, Any] = {}
        self._read, self._write = socket.socketpair()
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        # SIGTERM of several processes belongs to JAX's preemption service.
        mine = [signal.SIGINT, signal.SIGTERM] if self._alone else [signal.SIGINT]
        for number in mine:
            self._before[number] = signal.signal(number, self._handle)
        # Python's handlers wait until C++ returns, and a compilation takes long: this
        # thread counts the Ctrl-Cs as they come.
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._write.close()  # Ends the thread, which closes the other end.

    def _count(self) -> None:
        interrupts = 0
        with self._read:
            while number := self._read.recv(1):
                if number[0] != signal.SIGINT:
                    continue
                interrupts += 1
                if interrupts == 1 and not self._alone:
                    os.kill(os.getpid(), signal.SIGTERM)
                if interrupts == 2:
                    sys.stderr.write("stopped at once; the last checkpoint counts\n")
                    sys.stderr.flush()
                    os._exit(INTERRUPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        at_once = not self._noting or self._phases.name == "data"
        if self._alone and at_once:
            raise Preempted(self.signal)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Within it a signal is noted, and raised only in a wait for data."""
        self.raise_if_lost()
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def raise_if_lost(self) -> None:
        """Raises `Preempted` if one was lost on its way.

        Python drops what is raised while it runs a destructor: a Ctrl-C that falls
        into one would be forgotten.
        """
        if self._alone and self.signal is not None:
            raise Preempted(self.signal)

    def is_due(self, step: int) -> bool:
        """Whether to stop before another step; all processes get the same answer.

        Args:
          step: updates done; every process asks once for each.
        """
        if self._alone:
            return self.signal is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.signal = self.signal or signal.SIGTERM
        return True
