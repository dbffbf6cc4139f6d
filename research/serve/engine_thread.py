"""The engine on a thread of its own, and the answers of a request on the loop's side.

One thread owns JAX and steps the engine. Pieces come over by `call_soon_threadsafe`; a
client that is gone cancels its answers, whose slots are free at the next round.
"""

import asyncio
import collections
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from research.core.errors import UserError
from research.engine.adapter_names import LoadedAdapter
from research.engine.requests import EngineFullError, Piece, Request, check_request
from research.serve.api.prometheus_text import ServerMetrics
from research.serve.served_models import Deployment

if TYPE_CHECKING:
    from research.engine.continuous_batching import Answer

PING_EVERY = 15.0  # seconds without a piece after which a stream sends a comment
RETRY_EVERY = 0.05  # seconds between two looks for room


class EngineThread:
    """Opens the models and runs the engine.

    Attributes:
      deployment: what it has opened; None until then.
      error: why the models could not be opened, or why the engine ended.
    """

    def __init__(self, open_models: Callable[[], Deployment]):
        """`open_models` loads and compiles everything; it runs on the thread."""
        self._open = open_models
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.deployment: Deployment | None = None
        self.error: BaseException | None = None

    def start(self, when_changed: Callable[[], None]) -> None:
        """Starts the thread, which calls `when_changed` when ready and at its end."""
        self._when_changed = when_changed
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the thread is done."""
        return not self._thread.is_alive()

    def stop(self, patience: float) -> None:
        """Ends the engine after its round; waiting answers get `cancelled`."""
        self._stop.set()
        self._thread.join(patience)

    def _run(self) -> None:
        try:
            self.deployment = self._open()
            self._when_changed()
            self.deployment.engine.run_forever(self._stop)
            self.deployment.end()
        except BaseException as error:  # It must not die unseen on a thread.
            self.error = error
            if not isinstance(error, UserError):
                logging.exception("the engine has failed")
        finally:
            self._when_changed()


class AnswerGroup:
    """The answers of one HTTP request, at most as many at a time as there are slots.

    So a long list of prompts does not fill the queue for everybody else.
    """

    def __init__(
        self,
        deployment: Deployment,
        requests: Sequence[Request],
        metrics: ServerMetrics,
        model: str,
        adapter: LoadedAdapter,
    ):
        """Submits the first answers; must be called on the loop.

        All are made with `adapter`, which is in use, whatever is loaded meanwhile.

        Raises:
          EngineFullError: the queue has no room for one.
          UserError: one of `requests` is not possible; none is then answered.
        """
        self._engine, self._most = deployment.engine, deployment.slots
        self._metrics, self._model = metrics, model
        self._loop = asyncio.get_running_loop()
        self._arrived = time.monotonic()
        self._pieces: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._later = collections.deque(enumerate(requests))
        self._running: dict[int, Answer] = {}
        self._last: dict[int, float] = {}
        self._ping: asyncio.TimerHandle | None = None
        for request in requests:
            check_request(
                request, vocabulary=deployment.vocabulary, length=deployment.context
            )
        self._adapter: LoadedAdapter | None = self._engine.names.use("", adapter)
        try:
            self._submit()
        except UserError:
            self.cancel()
            raise
        self._ping_later()

    def cancel(self) -> None:
        """Gives up all answers; those that run end as `cancelled`."""
        self._later.clear()
        self._release()
        for answer in self._running.values():
            answer.cancel()

    def end(self, piece: Piece) -> None:
        """Ends all answers now with `piece`; the engine may take long, or be gone."""
        self.cancel()
        for index in self._running:
            self._pieces.put_nowait((index, piece))

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Pieces with the number of their answer, all that there are at a time.

        An empty list stands for `PING_EVERY` seconds without any.
        """
        try:
            while self._running or self._later:
                batch = [await self._pieces.get()]
                while not self._pieces.empty():
                    batch.append(self._pieces.get_nowait())
                found = [each for each in batch if each and self._take(*each)]
                if found:
                    await self._submit_more()
                yield found
        finally:
            self.cancel()
            if self._ping:
                self._ping.cancel()

    def _take(self, index: int, piece: Piece) -> bool:
        """Counts a piece; False for a second end, which `end` may have given."""
        if index not in self._running:
            return False
        self._measure(index, piece)
        if piece.finish:
            del self._running[index]
        return True

    def _submit(self) -> None:
        while self._later and len(self._running) < self._most:
            index, request = self._later[0]
            deliver = functools.partial(self._deliver, index)
            try:
                answer = self._engine.submit(request, deliver, self._adapter)
                self._running[index] = answer
            except EngineFullError:
                if not self._running:
                    raise
                return
            self._later.popleft()
        if not self._later:
            self._release()

    def _release(self) -> None:
        """The answers that have begun hold the adapter themselves."""
        if self._adapter:
            self._engine.names.release(self._adapter)
            self._adapter = None

    async def _submit_more(self) -> None:
        """As `_submit`; with none running it waits for room among other requests."""
        while self._later:
            try:
                self._submit()
            except EngineFullError:
                await asyncio.sleep(RETRY_EVERY)
            else:
                return

    def _deliver(self, index: int, piece: Piece) -> None:
        """Is called on the engine's thread."""
        put = self._pieces.put_nowait
        self._loop.call_soon_threadsafe(put, (index, piece))

    def _ping_later(self) -> None:
        self._ping = self._loop.call_later(PING_EVERY, self._send_ping)

    def _send_ping(self) -> None:
        self._pieces.put_nowait(None)
        self._ping_later()

    def _measure(self, index: int, piece: Piece) -> None:
        metrics, label, now = (
            self._metrics,
            {"model_name": self._model},
            time.monotonic(),
        )
        if piece.ids:
            metrics.generated.add(len(piece.ids), **label)
            if index in self._last:
                each = (now - self._last[index]) / len(piece.ids)
                for _ in piece.ids:
                    metrics.between.add(each, **label)
            else:
                metrics.first_token.add(now - self._arrived, **label)
            self._last[index] = now
        if piece.finish:
            reason = {"finished_reason": piece.finish} | label
            metrics.finished.add(**reason)
            metrics.whole.add(now - self._arrived, **label)
            self._measure_phases(self._running[index], now, label)

    def _measure_phases(
        self, answer: "Answer", now: float, label: dict[str, str]
    ) -> None:
        metrics = self._metrics
        if answer.admitted_at:
            metrics.queued.add(answer.admitted_at - self._arrived, **label)
        if answer.first_token_at:
            prefill = answer.first_token_at - answer.admitted_at
            metrics.prefill.add(prefill, **label)
            metrics.decode.add(now - answer.first_token_at, **label)
