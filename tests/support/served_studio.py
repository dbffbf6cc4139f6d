"""A studio on a real socket, and lines that a run writes meanwhile."""

import asyncio
import contextlib
import json
import socket
import threading

from free_ports import open_kept_port

from research.serve.http.http_server import HttpServer
from research.serve.http.sockets import open_port


def append(run, *lines, end="\n"):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(map(json.dumps, lines)) + end)


class ServedStudio:
    """A studio on a real socket, in a thread."""

    def __init__(self, app, port=0):
        self.listener = open_port("127.0.0.1", port) if port else open_kept_port()
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app, self.server = app, HttpServer(app, 3.0)
        program = self.server.serve([self.listener])
        self.thread = threading.Thread(target=asyncio.run, args=(program,))
        self.thread.start()

    def stop(self):
        self.app.state.studio.feed.end()
        self.server.should_exit = True
        self.thread.join()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
