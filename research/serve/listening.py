"""A server on its socket, from before the models are loaded to the last answer.

starlette has the routes and uvicorn the protocol: the two that most servers of models
use, with one and two small dependencies. FastAPI would add pydantic, errors in a shape
of its own, and pages that load scripts from elsewhere.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from research.core.errors import UserError
from research.engine.requests import Piece
from research.serve.api import completion_routes, model_routes
from research.serve.api.api_errors import ApiError, from_engine
from research.serve.api.guard import ApiKeys, Guard
from research.serve.api.server_state import ServerState
from research.serve.engine_thread import EngineThread

FIRST_REQUEST = 20.0  # seconds in which a new connection must send one
KEEP_ALIVE = 75  # seconds that a connection stays open between two requests
# Milliseconds after which the system ends a connection whose client reads nothing.
UNREAD = 120_000
BACKLOG = 2048
FOLLOW_EVERY = 10.0  # seconds between two looks for newer checkpoints
ROUTES = (
    ("POST", "/v1/chat/completions", completion_routes.chat_completions),
    ("POST", "/v1/completions", completion_routes.completions),
    ("GET", "/v1/models", model_routes.models),
    ("GET", "/v1/models/{name:path}", model_routes.model),
    ("POST", "/v1/load_lora_adapter", model_routes.load_adapter),
    ("POST", "/v1/unload_lora_adapter", model_routes.unload_adapter),
    ("POST", "/tokenize", model_routes.tokenize),
    ("POST", "/detokenize", model_routes.detokenize),
    ("GET", "/tokenizer_info", model_routes.tokenizer_info),
    ("GET", "/health", model_routes.health),
    ("GET", "/metrics", model_routes.metrics),
)


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError: the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        used = getattr(error, "errno", None) == errno.EADDRINUSE
        cause = "another process listens there" if used else str(error)
        raise UserError(
            f"--host={host} --port={port} cannot be used: {cause}; choose another "
            "port, or --port=0 for any free one"
        ) from error
    return listener


def open_unix_socket(path: Path) -> socket.socket:
    """A socket file that only this user can open. Raises UserError: it cannot be made.

    A file that a dead server has left is replaced.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise UserError(f"--uds={path} exists and is no socket")
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(path)) == 0:
                    raise UserError(f"--uds={path}: another process listens there")
            path.unlink()
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"--uds={path} cannot be made: {error}") from error
    except UserError:
        listener.close()
        raise
    return listener


def make_app(state: ServerState, keys: ApiKeys, hosts: Collection[str]) -> Starlette:
    """The routes; `hosts` are those of `Guard`."""
    handlers = {
        ApiError: _answer_error,
        UserError: _answer_error,
        HTTPException: _answer_error,
        Exception: _answer_error,
    }
    app = Starlette(
        routes=[Route(path, to, methods=[method]) for method, path, to in ROUTES],
        middleware=[Middleware(Guard, keys=keys, hosts=hosts)],
        exception_handlers=handlers,
    )
    app.state.server = state
    return app


async def _answer_error(http: Request, error: Exception) -> Response:
    if isinstance(error, UserError):
        error = from_engine(error, "prompt")
    elif isinstance(error, HTTPException):
        known = ", ".join(path for _, path, _ in ROUTES)
        error = ApiError(error.status_code, f"{error.detail}; there are {known}")
    elif not isinstance(error, ApiError):
        error = ApiError(500, "a bug of the server; its output has more")
    http.app.state.server.metrics.refused.add(status=str(error.status))
    return error.response()


class _Protocol(H11Protocol):
    """Closes connections on which no request comes; uvicorn would keep them."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(FIRST_REQUEST, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class _Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn would end the process by them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Ending:
    """The end of a server: no new requests, a grace for answers, then none."""

    def __init__(self, server: _Server, state: ServerState, grace: float):
        self._server, self._state, self._grace = server, state, grace

    def begin(self) -> None:
        """Stops, or if that has begun already, gives up all answers."""
        if self._state.is_stopping:
            self._give_up()
            return
        self._state.is_stopping = self._server.should_exit = True
        logging.info(
            "stopping: %d requests are being answered, for at most %g s",
            self._state.open_answers,
            self._grace,
        )
        asyncio.get_running_loop().call_later(self._grace, self._give_up)

    def _give_up(self) -> None:
        """Their clients are told that the server stops."""
        self._state.end_all(Piece(finish="cancelled"))


async def serve(
    app: Starlette,
    engine_thread: EngineThread,
    listener: socket.socket,
    grace: float,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> None:
    """Serves until one of `signals`, a call of `app.state.stop`, or a failed engine.

    Args:
      app: from `make_app`.
      engine_thread: is started and stopped.
      listener: is closed.
      grace: seconds that answers have after a signal; a second signal ends them.
      signals: see above.

    Raises:
      UserError: the models cannot be opened.
      BaseException: of the engine's thread.
    """
    _allow_many_connections()
    state: ServerState = app.state.server
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(grace) + 5,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server, loop = _Server(config), asyncio.get_running_loop()
    ending = _Ending(server, state, grace)
    app.state.stop = ending.begin

    def look() -> None:
        if engine_thread.error:
            state.end_all(Piece(finish="error", error="the engine has failed"))
            server.should_exit = True

    for number in signals:
        loop.add_signal_handler(number, ending.begin)
    engine_thread.start(functools.partial(loop.call_soon_threadsafe, look))
    following = asyncio.create_task(_follow(state))
    try:
        await server.serve([listener])
    finally:
        following.cancel()
        await asyncio.to_thread(engine_thread.stop, grace)
    if engine_thread.error:
        raise engine_thread.error


async def _follow(state: ServerState) -> None:
    """Looks for newer checkpoints of the runs that are served."""
    while True:
        await asyncio.sleep(FOLLOW_EVERY)
        with contextlib.suppress(ApiError):  # Nothing is loaded yet.
            await state.in_admin_thread(state.deployment.follow)


def _allow_many_connections() -> None:
    """Raises the limit of open files to the highest allowed: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
