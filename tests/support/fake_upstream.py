"""A server of models that is none: it says what a test gives it, on a Unix socket."""

import contextlib
import json
import socket
import threading


def head(status, kind, **headers):
    """The head of an answer without a length, which ends with its connection."""
    lines = {"content-type": kind, "connection": "close", **headers}
    text = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items())
    return f"HTTP/1.1 {status} X\r\n{text}\r\n".encode()


def chunk(text):
    """One chunk of a body whose length nobody knows before."""
    body = text.encode()
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


class FakeUpstream:
    """Answers each connection by `answer(connection, request)` in a thread."""

    def __init__(self, path, answer):
        self.path, self._answer = path, answer
        self.requests, self.broken = [], threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(
                    target=self._one, args=(connection,), daemon=True
                ).start()

    def _one(self, connection):
        connection.settimeout(20)
        with connection, contextlib.suppress(TimeoutError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            top, _, body = request.partition(b"\r\n\r\n")
            lines = top.decode().lower().split("\r\n")
            sizes = [int(x.split(":")[1]) for x in lines if x.startswith("content-len")]
            while len(body) < sum(sizes):
                body += connection.recv(65536)
            self.requests.append((top.decode(), body))
            try:
                self._answer(connection, self)
            except (BrokenPipeError, ConnectionResetError):
                self.broken.set()

    def stop(self):
        # A thread that waits in `accept` holds the socket open until it is shut down.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


def list_server(servers, name, **fields):
    """Lists a server that was started by hand."""
    folder = servers / name
    folder.mkdir(parents=True)
    (folder / "server.json").write_text(json.dumps(fields))
    return folder
