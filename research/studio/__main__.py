"""Trains, tests and deploys in a browser: `python -m research.studio`."""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp

from research.config import command_line
from research.config.knobs import knob
from research.core.cache_folders import user_cache
from research.core.errors import UserError
from research.serve.http.access_keys import ApiKeys
from research.serve.http.http_server import HttpServer
from research.serve.http.sockets import LOOPBACK, open_port, tunnel_to, url_of
from research.studio.access import HOST, TOKEN, make_token
from research.studio.app import keep_working, make_app
from research.studio.roots import Roots
from research.studio.studio_state import StudioState

USAGE = """
python -m research.studio [--runs=runs] [--data=data] [--port=8700]

Prints an address; open it in a browser. The page shows the run directories below
--runs, also those that were started by hand, and the files below --data; it reads and
writes nothing outside of them. A training that it starts is a process of its own: to
close the browser, or to end the studio, changes nothing. See docs/studio.md.
"""
SHUTDOWN = 3.0  # seconds for requests that are being answered


@dataclasses.dataclass(frozen=True)
class StudioFlags:
    """The flags of `python -m research.studio`."""

    runs: tuple[str, ...] = knob(
        ("runs",), "folder of run directories; may be repeated", is_path=True
    )
    data: tuple[str, ...] = knob(
        ("data",), "folder of data files; may be repeated", is_path=True
    )
    host: str = knob("127.0.0.1", "address; another one needs --key_file")
    name: tuple[str, ...] = knob(
        (), "host name of its address, as of a proxy in front; may be repeated"
    )
    port: int = knob(8700, "port; 0 takes any free one", low=0, high=65535)
    key_file: str = knob(
        "",
        "file of keys that serve as tokens, one a line; `admin KEY` may also start, "
        "stop and remove",
        is_path=True,
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    argv = [word.replace("--key-file", "--key_file", 1) for word in argv]
    f = command_line.parse(argv, USAGE, StudioFlags)
    if f.host not in LOOPBACK and not f.key_file:
        raise UserError(
            f"--host={f.host} lets other machines in, and then --key_file is needed; "
            "or stay on 127.0.0.1 and reach it by ssh -L"
        )
    names = [name.lower() for name in f.name]
    for name in names:
        if not HOST.fullmatch(name) or ":" in name:
            raise UserError(f"--name={name} is no host name: give it without a port")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # A line for each request.
    token = "" if f.key_file else make_token(user_cache() / "studio_token")
    keys = (
        ApiKeys.from_file(Path(f.key_file), "--key_file")
        if f.key_file
        else ApiKeys.from_text(f"admin {token}", "the token")
    )
    studio = StudioState(Roots(f.runs, "--runs"), Roots(f.data, "--data"))
    listener = open_port(f.host, f.port)
    _announce(f, token, listener)
    asyncio.run(_serve(make_app(studio, keys, f.host, names), studio, listener))
    return 0


def _announce(f: StudioFlags, token: str, listener: socket.socket) -> None:
    address = url_of(f.host, listener)
    asked = f"/?{TOKEN}={token}" if token else f"/?{TOKEN}=KEY, with a KEY of the file"
    sys.stdout.write(f"studio: {address}{asked}\n")
    sys.stdout.flush()
    if f.host in LOOPBACK:
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


if __name__ == "__main__":
    command_line.run(main)
