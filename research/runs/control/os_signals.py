"""Signals: SIGTERM, SIGHUP and the first Ctrl-C request a stop.

The second Ctrl-C forces it. `nohup` keeps its meaning: SIGHUP is then ignored.

In the training loop a signal is noted, and the run stops between two steps. A process
that runs alone raises it at once while it waits for data, and outside the loop.

Several processes must stop at the same step. JAX's preemption service tells all of
them about a SIGTERM that reached one, and picks a moment for the stop. A moment is the
number of a query to the service, so all processes must query equally often: once before
each step, and `MOMENTS - 1` times in each wait for data. They leave a wait early only
if all of them wait for the batch of the same step. If one has already begun that step,
its state is donated to the step, and the batch must arrive first.
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

from research.core.errors import INTERRUPTED, UnreachableError
from research.core.stop_signals import stop_signals
from research.runs.phase_timer import PhaseTimer

# Queries per step. In a wait they are at first one second apart, later a tenth of the
# time waited so far: half an hour in all. The service counts queries in 32 bits.
MOMENTS = 64

Value = TypeVar("Value")


class Preempted(KeyboardInterrupt):
    """A stop by signal, raised in the main thread. No `except Exception` catches it."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number


class StopRequest:
    """Listens to signals within its `with` block.

    Attributes:
      signal: the signal that requested the stop; None before it came.
      unreachable: why no more data comes, if this process is alone; it is to be raised
        once all is saved.
    """

    def __init__(self, phases: PhaseTimer):
        self._phases = phases
        self._alone = jax.process_count() == 1
        self._noting = False
        self._before: dict[signal.Signals, Any] = {}
        self._read, self._write = socket.socketpair()
        self.signal: signal.Signals | None = None
        self.unreachable: UnreachableError | None = None
        self._moment = 0

    def __enter__(self) -> "StopRequest":
        if not self._alone:
            # The service drops a signal that comes before its first query.
            multihost_utils.reached_preemption_sync_point(self._moment)
        if threading.current_thread() is not threading.main_thread():
            return self
        mine = {signal.SIGINT, *stop_signals()}
        if not self._alone:
            mine.remove(signal.SIGTERM)  # It belongs to JAX's preemption service.
        for number in mine:
            self._before[number] = signal.signal(number, self._handle)
        # Python runs handlers only after C++ returns, and a compilation takes long.
        # This thread counts each Ctrl-C at once.
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._write.close()  # Ends the thread, which closes the other socket.

    def _count(self) -> None:
        interrupts = 0
        with self._read:
            while number := self._read.recv(1):
                if number[0] not in (signal.SIGINT, signal.SIGHUP):
                    continue
                interrupts += number[0] == signal.SIGINT
                if interrupts < 2 and not self._alone:
                    os.kill(os.getpid(), signal.SIGTERM)  # The service knows no other.
                if interrupts == 2:
                    sys.stderr.write("stopped at once; the last checkpoint is kept\n")
                    sys.stderr.flush()
                    os._exit(INTERRUPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        at_once = not self._noting or self._phases.name == "data"
        if self._alone and at_once:
            raise Preempted(self.signal)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes signals within the block, and raises them only in a wait for data."""
        self.raise_if_lost()
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def raise_if_lost(self) -> None:
        """Raises `Preempted` again if Python has dropped it.

        Python drops exceptions that are raised in a destructor, so a Ctrl-C in that
        moment would be forgotten.
        """
        if self._alone and self.signal is not None:
            raise Preempted(self.signal)

    def is_due(self) -> bool:
        """Whether to stop before the next step; the same in all processes.

        Every process calls this once before each step.
        """
        if self._alone:
            return self.signal is not None
        return self._agreed()

    def _agreed(self) -> bool:
        """Whether all processes stop at this moment; all query every moment."""
        self._moment += 1
        if not multihost_utils.reached_preemption_sync_point(self._moment):
            return False
        self.signal = self.signal or signal.SIGTERM
        return True

    def wait(self, pull: Callable[[], Value]) -> Value:
        """Returns `pull()`; every process calls this once between two steps.

        Raises:
          Preempted: a signal came first, and this process is alone or all were waiting;
            or no more data comes, see `unreachable`.
        """
        if self._alone:
            self.raise_if_lost()  # A signal may have been noted since the last step.
            try:
                return pull()
            except UnreachableError as error:
                self.unreachable = error
                raise Preempted(signal.SIGTERM) from error
        begun, pulled = time.monotonic(), _in_thread(pull)
        for _ in range(MOMENTS - 1):
            if self._agreed():
                raise Preempted(self.signal or signal.SIGTERM)
            # Once the batch is there, the remaining queries follow at once.
            if not pulled.done():
                waited = time.monotonic() - begun
                concurrent.futures.wait([pulled], max(1.0, waited / 10))
        return pulled.result()


def _in_thread(function: Callable[[], Value]) -> "concurrent.futures.Future[Value]":
    """The result of `function`, from a thread that does not delay the exit."""
    future: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="data", daemon=True).start()
    return future
