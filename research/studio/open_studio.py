"""Opens the studio: its address, its pages, and the end by a signal."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp

from research.core.cache_folders import user_cache
from research.core.errors import UserError
from research.serve.http.access_keys import ApiKeys
from research.serve.http.http_server import HttpServer
from research.serve.http.sockets import LOOPBACK, open_port, tunnel_to, url_of
from research.studio.access import HOST, TOKEN, make_token
from research.studio.app import keep_working, make_app
from research.studio.roots import Roots
from research.studio.studio_state import StudioState

SHUTDOWN = 3.0  # seconds for requests that are being answered


def open_studio(
    runs: Sequence[str],
    data: Sequence[str],
    host: str,
    name: Sequence[str],
    port: int,
    key_file: str,
) -> None:
    """Serves the pages until a signal; the arguments are the flags of the command.

    Raises:
      UserError: a flag does not fit, or the port is taken.
    """
    if host not in LOOPBACK and not key_file:
        raise UserError(
            f"--host={host} lets other machines in, and then --key_file is needed; "
            "or stay on 127.0.0.1 and reach it by ssh -L"
        )
    names = [each.lower() for each in name]
    for each in names:
        if not HOST.fullmatch(each) or ":" in each:
            raise UserError(f"--name={each} is no host name: give it without a port")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # A line for each request.
    token = "" if key_file else make_token(user_cache() / "studio_token")
    keys = (
        ApiKeys.from_file(Path(key_file), "--key_file")
        if key_file
        else ApiKeys.from_text(f"admin {token}", "the token")
    )
    studio = StudioState(Roots(runs, "--runs"), Roots(data, "--data"))
    listener = open_port(host, port)
    _announce(host, token, listener)
    asyncio.run(_serve(make_app(studio, keys, host, names), studio, listener))


def _announce(host: str, token: str, listener: socket.socket) -> None:
    address = url_of(host, listener)
    asked = f"/?{TOKEN}={token}" if token else f"/?{TOKEN}=KEY, with a KEY of the file"
    sys.stdout.write(f"studio: {address}{asked}\n")
    sys.stdout.flush()
    if host in LOOPBACK:
        logging.info("from another machine: %s", tunnel_to(listener))


async def _serve(app: ASGIApp, studio: StudioState, listener: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C. Jobs continue."""
    server = HttpServer(app, SHUTDOWN)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        studio.feed.end()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    working = asyncio.create_task(keep_working(studio))
    try:
        await server.serve([listener])
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
