"""A server on its socket, from before the models are loaded to the last answer."""

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Collection, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.core.errors import UserError
from research.engine.requests import Piece
from research.serve.api import completion_routes, model_routes
from research.serve.api.api_errors import ApiError, from_engine
from research.serve.api.guard import Guard
from research.serve.api.server_state import ServerState
from research.serve.engine_thread import EngineThread
from research.serve.http.access_keys import ApiKeys, KeyFile
from research.serve.http.http_server import HttpServer

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
    ("GET", "/slots", model_routes.slots),
    ("GET", "/health", model_routes.health),
    ("GET", "/metrics", model_routes.metrics),
)


def make_app(
    state: ServerState, keys: ApiKeys | KeyFile, hosts: Collection[str]
) -> Starlette:
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


class _Ending:
    """The end of a server: no new requests, a grace for answers, then none."""

    def __init__(self, server: HttpServer, state: ServerState, grace: float):
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
    state: ServerState = app.state.server
    server, loop = HttpServer(app, grace + 5), asyncio.get_running_loop()
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
        try:
            await state.in_admin_thread(state.deployment.follow)
        except ApiError:  # Nothing is loaded yet.
            continue
        except Exception:  # Memory that ends while weights are read, say.
            logging.exception("a newer checkpoint could not be looked for or read")
