"""Connections and servers end, whatever is still on its way."""

import os
import signal
import threading

from live_servers import request

from research.serve import __main__ as serving
from research.serve.http import http_server


def receive(connection, last):
    """Reads up to `last`; head and body of an answer come one by one."""
    found = b""
    while last not in found:
        chunk = connection.recv(65536)
        assert chunk, found
        found += chunk
    return found


def test_half_a_request_is_not_waited_for(server, monkeypatch):
    whole = request("/health", b"", "GET")
    with server.socket() as connection:
        connection.sendall(whole)
        receive(connection, b'{"status":"ok"}')
        monkeypatch.setattr(http_server, "WHOLE_HEAD", 0.05)
        connection.sendall(whole[:-2])
        assert not connection.recv(65536)
    with server.socket() as connection:
        assert not connection.recv(65536)
    monkeypatch.undo()
    # Two at once are answered one after the other; old clients are served, too.
    old = whole.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert server.raw(whole + whole + old).count(b'{"status":"ok"}') == 3


def test_a_body_that_was_answered_is_not_waited_for(server, monkeypatch):
    evil = {"Host": "evil.example"}
    for path, headers, status in (
        ("/nowhere", {}, 404), ("/health", {}, 405), ("/tokenize", evil, 403),
    ):  # fmt: skip
        sent = request(path, b"body", **headers)
        with server.socket() as connection:
            connection.sendall(sent[:-1])
            assert receive(connection, b"}}").split()[1] == b"%d" % status
            connection.sendall(sent[-1:])  # In time: the next request is answered.
            with monkeypatch.context() as patch:
                patch.setattr(http_server, "WHOLE_HEAD", 0.05)
                connection.sendall(sent[:-1])
                assert receive(connection, b"}}").split()[1] == b"%d" % status
                assert not connection.recv(65536)


def test_a_stop_while_a_model_loads_ends_the_process(monkeypatch):
    """An orderly end would destroy what the thread that loads still uses."""
    left = []

    def load(flags):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()  # On a daemon thread, which holds no test up.

    monkeypatch.setattr(serving, "_open_alone", load)
    monkeypatch.setattr(os, "_exit", left.append)
    serving.main(["serve", "--model=any", "--port=0", "--grace=0.1"])
    assert left == [0]
