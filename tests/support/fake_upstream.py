"""A server of models that is none: it says what a test gives it, on a Unix socket."""

import contextlib
import json
import socket
import threading

from waiting import PATIENCE

CARDS = [
    {"id": "tuned", "root": "/absent/tuned", "parent": "base", "step": 30,
     "system_fingerprint": "fp_tuned", "max_model_len": 64},
    {"id": "base", "root": "pkg://a/b.gguf", "parent": None, "step": None,
     "system_fingerprint": "fp_base", "max_model_len": 64},
]  # fmt: skip


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
        connection.settimeout(PATIENCE)
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


def said_by_models(connection, fake):
    """Answers as `research.serve` does, with the name of the model as text."""
    top, body = fake.requests[-1]
    path = top.split()[1]
    asked = json.loads(body) if body else {}
    if path == "/health":
        found = {"status": "ok"}
    elif path == "/v1/models":
        found = {"data": CARDS}
    elif path.startswith("/tokenizer_info"):
        found = {"chat_template": "{{ messages }}"}
    elif path == "/tokenize":
        found = {"tokens": [1, 2, 3], "count": 3}
    elif path == "/slots":
        found = [{"is_processing": number < 2} for number in range(8)]
    elif path == "/metrics":
        found = []
    elif path == "/detokenize":
        found = {"prompt": "<user>Why?"}
    elif path == "/v1/completions":
        assert asked["echo"] and asked["max_tokens"] == 0
        own = [None, -9.0, -9.0] + [-0.5 if asked["model"] == "tuned" else -3.0] * 2
        found = {"choices": [{"logprobs": {"token_logprobs": own}}]}
        found["system_fingerprint"] = f"fp_{asked['model']}"
    else:
        send_answer(connection, asked)
        return
    reply(connection, found)


def reply(connection, found):
    sent = json.dumps(found).encode()
    start = head(200, "application/json", content_length=len(sent))
    connection.sendall(start + sent)


def send_answer(connection, asked):
    names = [asked["model"], " says <b>"]
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    scores = [{"token": name, "logprob": -1.0, "bytes": []} for name in names]
    common = {"system_fingerprint": f"fp_{asked['model']}"}
    if not asked.get("stream"):
        choice = {"message": {"content": "".join(names)}, "finish_reason": "stop"}
        choice |= {"logprobs": {"content": scores}, "token_ids": [5, 6]}
        reply(connection, common | {"choices": [choice], "usage": usage})
        return
    connection.sendall(head(200, "text/event-stream", transfer_encoding="chunked"))
    for number, name in enumerate(names):
        choice = {"delta": {"content": name}, "token_ids": [5 + number]}
        choice |= {"logprobs": {"content": [scores[number]]}}
        choice |= {"finish_reason": "stop" if number else None}
        event = json.dumps(common | {"choices": [choice]})
        connection.sendall(chunk(f"data: {event}\n\n"))
    last = json.dumps(common | {"choices": [], "usage": usage})
    connection.sendall(chunk(f"data: {last}\n\ndata: [DONE]\n\n") + b"0\r\n\r\n")
