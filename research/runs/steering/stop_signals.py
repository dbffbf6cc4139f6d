"""Signals: SIGTERM and the first Ctrl-C ask a run to stop, the second makes it.

In the training loop a signal is noted, and the run stops between two steps. While a
lone process waits for data, or does anything outside the loop, it is raised at once.
Several processes must agree on the step they stop at: JAX's preemption service tells
all of them of a SIGTERM that reached one, and picks the moment. Moments are numbered
by how often it was asked, and all ask equally often: once before each step, and
`MOMENTS - 1` times in each wait for data. So a wait is broken off where all wait for
the batch of one step; where another process has already begun that step, its arrays
are half given away, and the batch must come.
"""

import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from research.runs.phase_timer import PhaseTimer

INTERRUPTED = 130  # 128 + SIGINT, as shells say it.
# At which processes can agree to stop, by step. A second apart in a wait, later a tenth
# of what was waited: half an hour in all. The service counts in 32 bits.
MOMENTS = 64

Value = TypeVar("Value")


class Preempted(KeyboardInterrupt):
    """Raised in the main thread by a signal; no `except Exception` catches it."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number


class StopRequest:
    """Listens while it is entered.

    Attributes:
      signal: the one that asked; None so far.
    """

    def __init__(self, phases: PhaseTimer):
        self._phases = phases
        self._alone = jax.process_count() == 1
        self._noting = False
        self._before: dict[signal.Signals, Any] = {}
        self._read, self._write = socket.socketpair()
        self.signal: signal.Signals | None = None
        self._moment = 0

    def __enter__(self) -> "StopRequest":
        if not self._alone:
            # The service drops a notice that comes before anybody has asked.
            multihost_utils.reached_preemption_sync_point(self._moment)
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

    def is_due(self) -> bool:
        """Whether to stop before another step; all processes get the same answer.

        Every process asks once before each.
        """
        if self._alone:
            return self.signal is not None
        return self._agreed()

    def _agreed(self) -> bool:
        """Whether this is the moment at which all stop; each asks about each moment."""
        self._moment += 1
        if not multihost_utils.reached_preemption_sync_point(self._moment):
            return False
        self.signal = self.signal or signal.SIGTERM
        return True

    def wait(self, pull: Callable[[], Value]) -> Value:
        """What `pull` returns; every process calls this once between two steps.

        Raises:
          Preempted: a signal came first, to a lone process or while all waited.
        """
        if self._alone:
            self.raise_if_lost()  # It came since the step before, and was only noted.
            return pull()
        begun, pulled = time.monotonic(), _in_thread(pull)
        for _ in range(MOMENTS - 1):
            if self._agreed():
                raise Preempted(self.signal or signal.SIGTERM)
            # Once the batch is there, the moments that are left pass at once.
            if not pulled.done():
                waited = time.monotonic() - begun
                concurrent.futures.wait([pulled], max(1.0, waited / 10))
        return pulled.result()


def _in_thread(function: Callable[[], Value]) -> "concurrent.futures.Future[Value]":
    """Its result, from a thread that no exit of the process waits for."""
    future: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="data", daemon=True).start()
    return future
