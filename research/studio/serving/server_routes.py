"""Starts and stops servers, and leads requests of pages to them.

A page may connect to the studio alone, and only the studio has the key. The paths that
answer are forwarded, and those that change a server are not.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from research.core.local_paths import split_step
from research.serve.api.guard import read_limited
from research.studio.jobs.job_commands import as_text, removing
from research.studio.page_errors import PageError, not_found
from research.studio.pages.page_view import Form, json_answer, noted, see, studio_of
from research.studio.roots import shown_paths
from research.studio.serving.model_servers import ModelServer
from research.studio.serving.server_client import asking, status_of

FORWARDED = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/tokenizer_info": "GET",
    "/v1/models": "GET",
    "/health": "GET",
    "/slots": "GET",
    "/metrics": "GET",
}
LONGEST = 8 << 20  # bytes of a request, as the server's own limit
KEPT_HEADERS = ("content-type", "retry-after", "x-ignored-fields", "x-request-id")
EVENTS = "text/event-stream"


def run_flags(request: Request, written: Sequence[str]) -> list[str]:
    """`--run` flags of runs as pages name them, `runs/a` or `runs/a@300`.

    Raises:
      PageError: a run is not there, or leads out of the roots.
    """
    flags = []
    for name in written:
        place, step = split_step(name)
        (folder,) = shown_paths([studio_of(request).runs.find(place)])
        flags.append(f"--run={folder}@{step}" if step else f"--run={folder}")
    return flags


async def start_server(
    request: Request, name: str, flags: Sequence[str]
) -> ModelServer:
    """Starts a server and notes it. Raises UserError: see `ModelServers.start`."""
    studio, who = studio_of(request), request.scope["who"]
    command = await asyncio.to_thread(studio.servers.command, name, flags)
    with noted(request, "serve", name, command=as_text(command)):
        return await asyncio.to_thread(studio.servers.start, name, flags, who)


async def change(request: Request) -> Response:
    """The buttons of a server: stop and remove."""
    form = await Form.read(request)
    studio, name, action = studio_of(request), form.get("server"), form.get("action")
    actions = {"stop": studio.servers.stop, "remove": studio.servers.remove}
    if action not in actions:
        raise PageError(400, f"action={action[:80]!r}: it must be stop or remove")
    with noted(request, f"{action} server", name):
        await asyncio.to_thread(actions[action], name)
    done = {"stop": "was told to end (SIGTERM)", "remove": "is removed"}[action]
    page = form.get("page")
    page = page if page in ("/chat", "/deploy") else "/chat"
    return see(page, said=f"the server {name} {done}")


async def described(request: Request) -> list[dict[str, Any]]:
    """All servers with their states, for pages and as JSON; no key is among it."""
    servers = await asyncio.to_thread(studio_of(request).servers.all)
    states = await asyncio.gather(*map(status_of, servers))
    return [
        {
            "name": server.name,
            "endpoint": server.endpoint,
            "command": list(server.command),
            "began": server.began,
            "by": server.by,
            "pid": server.pid,
            "removing": removing(server.folder),
            **dataclasses.asdict(status),
        }
        for server, status in zip(servers, states, strict=True)
    ]


async def listed(request: Request) -> Response:
    """`described` for scripts."""
    return json_answer(await described(request))


async def forward(request: Request) -> Response:
    """Leads a request to a server, and its answer back."""
    path = "/" + request.path_params["path"]
    if FORWARDED.get(path) != request.method:
        known = ", ".join(f"{method} {path}" for path, method in FORWARDED.items())
        raise not_found(f"{request.method} {path} is not forwarded; there are {known}")
    server = await asyncio.to_thread(
        studio_of(request).servers.find, request.path_params["name"]
    )
    if server.problem:
        raise PageError(502, server.problem)
    body = await read_limited(request, LONGEST) if request.method == "POST" else None
    query = request.url.query
    return ForwardedAnswer(
        server, request.method, f"{path}?{query}" if query else path, body
    )


class ForwardedAnswer(Response):
    """An answer that comes while it is made, and is given up if the browser leaves."""

    def __init__(self, server: ModelServer, method: str, path: str, body: bytes | None):
        super().__init__()
        self._asked = (server, method, path, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._forward(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _forward(self, send: Send) -> None:
        has_begun = False
        try:
            async with asking(*self._asked) as answer:
                if answer.status_code == 401:  # The browser's own key is another one.
                    server = self._asked[0].name
                    message = f"the server {server} refuses its key: its file of keys "
                    raise PageError(502, f"{message}must hold one that is no digest")
                found = answer.headers
                kept = [(x, found[x]) for x in KEPT_HEADERS if x in found]
                headers = [(k.encode(), v.encode("latin-1")) for k, v in kept]
                is_stream = answer.headers.get("content-type", "").startswith(EVENTS)
                whole = b"" if is_stream else await answer.aread()
                start = {"type": "http.response.start", "status": answer.status_code}
                await send(start | {"headers": headers})
                has_begun = True
                if is_stream:
                    async for chunk in answer.aiter_raw():
                        await _send_part(send, chunk)
                await _send_part(send, whole, is_last=True)
        except PageError as error:
            if not has_begun:
                raise
            # The status is sent: the error is an event, and `[DONE]` does not follow.
            written = json.dumps({"error": {"message": error.message, "code": None}})
            await _send_part(send, f"\n\ndata: {written}\n\n".encode(), is_last=True)


async def _send_part(send: Send, part: bytes, is_last: bool = False) -> None:
    body = {"type": "http.response.body", "body": part, "more_body": not is_last}
    with contextlib.suppress(OSError):  # The browser is gone, as `receive` says, too.
        await send(body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


ROUTES = (
    Route("/act/server", change, methods=["POST"]),
    Route("/api/servers", listed),
    Route("/api/servers/{name}/{path:path}", forward, methods=["GET", "POST"]),
)
