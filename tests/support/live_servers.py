"""A server in a thread of the test's process, on a real socket."""

import asyncio
import contextlib
import json
import random
import socket
import struct
import threading
import time

import httpx
import jax
from waiting import PATIENCE, wait_until

from research.config.run_config import MeshConfig
from research.parallel import mesh as meshes
from research.serve.api.server_state import ServerState
from research.serve.engine_thread import EngineThread
from research.serve.http.access_keys import ApiKeys
from research.serve.http.sockets import open_port
from research.serve.listening import make_app, serve
from research.serve.open_models import Capacity, open_models

SLOTS, CONTEXT, QUEUE = 3, 128, 6
ENDLESS = {
    "model": "base", "messages": [{"role": "user", "content": "a"}], "stream": True,
    "ignore_eos": True, "n": 8,
}  # fmt: skip


def request(path, body, method="POST", **headers):
    """The bytes of a request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Host": "localhost", "Content-Length": len(body)} | headers
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def drop_connections(port, count):
    """Opens connections and drops them in any state, some by a reset."""
    draw = random.Random(2)
    whole = request("/v1/chat/completions", ENDLESS)
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        connection.sendall(whole[: draw.choice([0, 1, 50, len(whole) - 1, len(whole)])])
        if draw.random() < 0.5:
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()


def open_tiny(folder, runs=(), roots=(), adapters=2):
    """The tiny model of `folder` on one device."""
    mesh = meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    capacity = Capacity(SLOTS, CONTEXT, adapters, 4, QUEUE, 1 << 20)
    return open_models(runs, str(folder), capacity, roots, mesh)


class LiveServer:
    """Serves what `open_models` opens until `stop`."""

    def __init__(self, open_models, keys=None, grace=5.0):
        listener = open_port("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.engine_thread = EngineThread(open_models)
        self.state = ServerState(self.engine_thread)
        self.error = None
        self._app = make_app(self.state, keys or ApiKeys(), ("127.0.0.1",))
        self._loop = asyncio.new_event_loop()
        serving = serve(self._app, self.engine_thread, listener, grace, signals=())
        # A daemon, so that a server that does not end cannot hold the tests.
        self._thread = threading.Thread(target=self._run, args=(serving,), daemon=True)
        self._thread.start()

    def _run(self, serving):
        try:
            self._loop.run_until_complete(serving)
        except BaseException as error:
            self.error = error
        finally:
            self._loop.close()

    @property
    def deployment(self):
        return self.engine_thread.deployment

    def ready(self):
        wait_until(lambda: self.deployment or self.error)
        return self

    def idle(self):
        """Until no answer has a slot or waits for one."""
        stats = self.deployment.engine.stats
        wait_until(lambda: not stats().running and not stats().waiting)

    def begin_stop(self):
        self._loop.call_soon_threadsafe(self._app.state.stop)

    def stop(self):
        with contextlib.suppress(RuntimeError):  # It has ended.
            self.begin_stop()
            time.sleep(0.05)
            self.begin_stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=PATIENCE, **options)

    def post(self, path, body=None, **options):
        if body is not None:
            options["content"] = json.dumps(body)
        return httpx.post(self.url + path, timeout=PATIENCE, **options)

    def socket(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def raw(self, sent):
        """All that comes back for these bytes."""
        with self.socket() as connection:
            found = b""
            with contextlib.suppress(ConnectionError):  # It refuses to read more.
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while chunk := connection.recv(65536):
                    found += chunk
        return found
