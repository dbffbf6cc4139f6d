"""Asks a served model: the studio's own calls, and the state of a server."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx

from research.core.json_files import Shape, mismatch
from research.runs.control.job_logs import last_error, tail
from research.studio.page_errors import PageError
from research.studio.serving.model_servers import ModelServer

CONNECT = 5.0  # seconds
# A stream has a comment each 15 s, so a server that is silent for longer hangs.
SILENT = 120.0  # seconds
LOOK = 2.0  # seconds for the answer of /health
LOG_BYTES = 6000
OPEN_PATH = "/health"  # It needs no key.
# Shapes of what `research.serve` answers. Another program may have its port.
HEALTHY = {"status": str}
REFUSED = {"error": {"message": str}}
CARD = {
    **dict.fromkeys(("id", "root", "system_fingerprint"), str),
    **{"parent": str | None, "step": int | None, "max_model_len": int},
}


@dataclasses.dataclass(frozen=True)
class ServerStatus:
    """The state of a server now.

    Attributes:
      state: `loading` (its process runs, and its models are read or compiled),
        `ready`, `stopping`, `ended`, or `unreachable`: it does not answer, and its
        process is not known.
      said: the last line of its log, or why it has ended.
    """

    state: Literal["loading", "ready", "stopping", "ended", "unreachable"]
    said: str


async def status_of(server: ModelServer) -> ServerStatus:
    """Reads the files and the process of a server, and asks it whether it is ready."""
    if server.problem:
        return ServerStatus("ended", server.problem)
    log = tail(server.log, LOG_BYTES).strip()
    line = log.rpartition("\n")[2]
    if server.pid and server.process is None:
        error = last_error(log).removeprefix("error: ")
        return ServerStatus("ended", error or line or "it has written nothing")
    try:
        answer = await call(server, "GET", OPEN_PATH, patience=LOOK)
    except PageError as error:
        if server.pid:
            return ServerStatus("loading", line or "its process has begun")
        return ServerStatus("unreachable", error.message)
    try:
        found = _json_of(server, answer, HEALTHY if answer.is_success else REFUSED)
    except PageError as error:  # It says so while our process still loads, too.
        return ServerStatus("loading" if server.pid else "ended", error.message)
    if answer.is_success:
        return ServerStatus("ready", line)
    code, message = found["error"].get("code"), found["error"]["message"]
    if code == "loading":
        return ServerStatus("loading", line)
    # Any other code: its engine has failed.
    return ServerStatus("stopping" if code == "stopping" else "ended", message)


@contextlib.asynccontextmanager
async def asking(
    server: ModelServer,
    method: str,
    path: str,
    body: bytes | None = None,
    patience: float | None = SILENT,
) -> AsyncIterator[httpx.Response]:
    """The answer of a server, whose body has not been read.

    Args:
      server: is asked with its own key.
      method: of HTTP.
      path: such as `/v1/models`.
      body: JSON, or None.
      patience: seconds without a byte after which it is given up.

    Raises:
      PageError: 502 it cannot be reached, in the block, too: it ended or is silent.
    """
    if server.pid and server.process is None:  # Its port may be another program's.
        raise PageError(502, f"the server {server.name} has ended")
    try:
        key = server.key() if path != OPEN_PATH else ""
    except (OSError, ValueError) as error:
        message = f"the keys of server {server.name} cannot be read: {error}"
        raise PageError(502, message) from error
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["content-type"] = "application/json"
    host = f"127.0.0.1:{server.port}" if server.port else "localhost"
    way = httpx.AsyncHTTPTransport(verify=False, uds=server.uds or None)
    limits = httpx.Timeout(patience, connect=CONNECT)
    async with httpx.AsyncClient(
        transport=way, timeout=limits, trust_env=False, base_url=f"http://{host}"
    ) as client:
        asked = client.stream(method, path, content=body, headers=headers)
        try:
            async with asked as answer:
                yield answer
        except httpx.ConnectError as error:
            message = f"the server {server.name} cannot be reached: it has ended"
            raise PageError(502, f"{message}, or does not listen yet") from error
        except httpx.TimeoutException as error:
            message = f"the server {server.name} is silent for {patience:g} s"
            raise PageError(502, message) from error
        except httpx.HTTPError as error:
            message = f"the server {server.name} ended in the middle of an answer"
            raise PageError(502, message) from error


async def call(
    server: ModelServer,
    method: str,
    path: str,
    body: bytes | None = None,
    patience: float | None = None,
) -> httpx.Response:
    """The whole answer of a server, whatever its status. Raises PageError: 502."""
    async with asking(server, method, path, body, patience) as answer:
        await answer.aread()
    return answer


async def call_json(
    server: ModelServer,
    method: str,
    path: str,
    shape: Shape,
    body: bytes | None = None,
) -> Any:
    """The JSON of an answer, which has a shape.

    Raises:
      PageError: the status and message of the server where it refuses; 502 otherwise.
    """
    answer = await call(server, method, path, body)
    if answer.status_code != 200:
        raise refusal(server, answer)
    return _json_of(server, answer, shape)


async def models_of(server: ModelServer) -> list[dict[str, Any]]:
    """The cards of its models, see `CARD`. Raises PageError."""
    return (await call_json(server, "GET", "/v1/models", {"data": [CARD]}))["data"]


def refusal(server: ModelServer, answer: httpx.Response) -> PageError:
    """The error that a server has answered with, or 502 where that is none."""
    try:
        message = _json_of(server, answer, REFUSED)["error"]["message"]
    except PageError as error:
        return error
    # A browser that is told 401 would take it for its own key.
    status = answer.status_code if answer.is_error else 502
    return PageError(
        502 if status == 401 else status, f"server {server.name}: {message}"
    )


def _json_of(server: ModelServer, answer: httpx.Response, shape: Shape) -> Any:
    """Raises PageError: the answer is no such JSON."""
    try:
        found = answer.json()
        problem = mismatch(found, shape)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise PageError(
            502,
            f"the server {server.name} answered what cannot be read ({problem}): is "
            f"another program at {server.endpoint}?",
        )
    return found
