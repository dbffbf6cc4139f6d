"""The guard in front of all routes: keys, sizes of bodies, and names of the host."""

import asyncio
import logging
import re
import secrets
from collections.abc import Collection

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research.serve.api.api_errors import ApiError
from research.serve.http.access_keys import ApiKeys, KeyFile, Role

BODY_TIME = 60.0  # seconds in which a body must arrive
DRAINED = 64 << 20  # bytes of a body that is too long and read to its end
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# A monitor has no key; it learns nothing of the models.
OPEN_PATHS = ("/health",)


class Guard:
    """ASGI middleware.

    Without keys, a page in the browser of the user could send requests to a server on
    the same machine: directly, or under a name of its own that leads there (DNS
    rebinding). So the `Host` must then be one of ours, and an `Origin` the same.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | KeyFile, hosts: Collection[str]):
        """`hosts` are the names of this server; empty where it has no address."""
        self.app, self.keys = app, keys
        self.hosts = {"localhost", "127.0.0.1", "[::1]", *hosts} if hosts else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        role = self.keys.role(headers.get(b"authorization", b""))
        error = self._refusal(scope["path"], headers, role)
        if error:
            await error.response()(scope, receive, send_with_id)
            return
        scope["role"] = role
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logging.debug("request %s: the client is gone", request_id)

    def _refusal(
        self, path: str, headers: dict[bytes, bytes], role: Role | None
    ) -> ApiError | None:
        if role is None and path not in OPEN_PATHS:
            return ApiError(
                401,
                "a key is missing or wrong: send the header Authorization: Bearer KEY",
                None,
                "invalid_api_key",
            )
        if self.keys.digests or not self.hosts:
            return None
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if re.sub(r":\d*$", "", host) not in self.hosts:
            shown = f"the header Host is {host[:80]!r}, which is no name of this server"
            return ApiError(403, f"{shown}; use an address, or serve with keys")
        if origin and origin.partition("://")[2] != host:
            return ApiError(403, "pages of other origins may not send requests here")
        return None


def require_admin(request: Request) -> None:
    """Raises ApiError if the key of a request may not change the adapters."""
    if request.scope["role"] != "admin":
        raise ApiError(
            403,
            "this key may not change adapters; a line `admin KEY` gives one that may",
        )


async def read_limited(request: Request, limit: int) -> bytes:
    """The body of a request.

    A body that is too long is read on and dropped, up to `DRAINED` bytes: most clients
    read no answer before they have sent everything.

    Raises:
      ApiError: it has more than `limit` bytes, or takes longer than `BODY_TIME`.
      ClientDisconnect: the client is gone.
    """
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIME):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > DRAINED:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body took over {BODY_TIME:g} s") from None
    if size > limit:
        raise ApiError(413, f"the body has over {limit} bytes", None, "body_too_long")
    return b"".join(chunks)
