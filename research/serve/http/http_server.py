"""uvicorn, as our servers use it: quiet, and without its own handling of signals.

starlette has the routes and uvicorn the protocol: the two that most servers of models
use, with one and two small dependencies. FastAPI would add pydantic, errors in a shape
of its own, and pages that load scripts from elsewhere.
"""

import asyncio
import contextlib
import logging
import resource
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds in which a new connection must send the head of a request, and any connection
# the rest of a head that it has begun, or of a body that is answered already.
WHOLE_HEAD = 20.0
KEEP_ALIVE = 75  # seconds that a connection stays open between two requests


class _Protocol(H11Protocol):
    """Closes connections on which no request comes; uvicorn would keep them."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Times what must still come, however slowly its bytes do."""
        if self.conn.their_state is h11.IDLE:
            must_come = self.cycle is None or bool(self.conn.trailing_data[0])
        else:  # A body that nobody has read.
            is_body = self.conn.their_state is h11.SEND_BODY
            must_come = is_body and self.cycle.response_complete
        if must_come and self._timer is None:
            self._timer = self.loop.call_later(WHOLE_HEAD, self.transport.abort)
        elif self._timer and not must_come:
            self._timer.cancel()
            self._timer = None


class HttpServer(uvicorn.Server):
    """Leaves signals to its caller: uvicorn would end the process by them.

    It stops when its caller sets `should_exit`.
    """

    def __init__(self, app: ASGIApp, shutdown: float):
        """`shutdown` is the time in seconds for requests that are being answered."""
        allow_many_connections()
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(shutdown)),
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def allow_many_connections() -> None:
    """Raises the limit of open files to the highest allowed: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
