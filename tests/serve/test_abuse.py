"""Clients that are broken or evil: refused, while others are served."""

import asyncio
import contextlib
import itertools
import json
import random
import re
import socket
import threading

import httpx
import msgspec
import openai
import psutil
import pytest
from live_servers import (
    CONTEXT,
    ENDLESS,
    QUEUE,
    SLOTS,
    LiveServer,
    drop_connections,
    open_tiny,
    request,
)
from tiny_model import make_tiny_model
from waiting import PATIENCE, wait_until

from research.core.errors import UserError
from research.serve.api.request_types import ChatRequest, CompletionRequest
from research.serve.http.access_keys import ApiKeys
from research.serve.http.sockets import open_port, open_unix_socket

ASK = {"model": "base", "prompt": "a", "max_tokens": 4}
# The end token is never chosen, so an answer has its full length.
LONG = {"model": "base", "prompt": "a", "max_tokens": CONTEXT - 1, "ignore_eos": True}


@contextlib.contextmanager
def held(server, slots=SLOTS):
    """No token is taken, once so many slots are in use, until the block has ended."""
    engine, ended = server.deployment.engine, threading.Event()
    decoder = engine._decoder
    launch = decoder.launch

    def wait():
        if engine.stats().running >= slots:
            ended.wait(PATIENCE)
        return launch()

    decoder.launch = wait
    try:
        yield
    finally:
        del decoder.launch
        ended.set()


def works(server):
    return server.post("/v1/completions", ASK).json()["usage"]["completion_tokens"] >= 1


def test_a_body_of_ten_megabytes_is_refused_and_nobody_waits(server):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        found = server.post(path, {"prompt": "x" * (10 << 20)})
        assert found.status_code == 413
        assert found.json()["error"]["code"] == "body_too_long"
    # One that only says it is long costs nothing.
    with server.socket() as connection:
        connection.sendall(request("/tokenize", b"", Content_Length=1 << 40))
        assert works(server)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_no_value_of_any_field_is_a_bug(server, kind):
    """Every field with values of every type: an answer, or a refusal that names it."""
    chat = kind is ChatRequest
    path = "/v1/chat/completions" if chat else "/v1/completions"
    least = {"model": "base", "max_tokens": 1}
    least |= {"messages": ENDLESS["messages"]} if chat else {"prompt": "a"}
    draw = random.Random(0)
    values = ["", "x", 0, 1, -1, 2**63, 1.5, True, None, [], [0], [["x"]], {}, {"a": 1}]
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        for field in msgspec.structs.fields(kind):
            for value in draw.sample(values, 3):
                body = least | {field.name: value}
                if body.get("stream") or (value == "x" and field.name == "stop"):
                    continue
                found = client.post(path, json=body)
                error = found.json().get("error", {"param": field.name})
                assert found.status_code in (200, 400, 404), (body, found.text)
                assert (error["param"] or "").startswith(field.name.split("_")[0])


def test_bytes_that_are_no_request_are_answered_or_dropped(server):
    draw = random.Random(1)
    for sent in (
        b"", b"\0" * 1000, b"\r\n" * 100, b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 99_000,
        request("/v1/completions", b"{", Content_Length="x"),
        request("/v1/completions", b"{", Content_Length=-5),
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        draw.randbytes(5000),
    ):  # fmt: skip
        found = server.raw(sent)
        assert not found or found.startswith(b"HTTP/1.1 4"), (sent[:50], found[:200])
    assert works(server)


def test_paths_and_methods_that_are_not_there_say_so(server):
    for method, path, status in (
        ("GET", "/", 404), ("GET", "/v1/../../etc/passwd", 404),
        ("POST", "/v1/embeddings", 404),
        ("DELETE", "/v1/models", 405), ("GET", "/v1/completions", 405),
        ("GET", "/%00", 404), ("GET", "/v1/models/%0d%0aSet-Cookie:%20a=b", 404),
        ("GET", "/v1/models/..%2f..%2fetc", 404),
    ):  # fmt: skip
        found = httpx.request(method, server.url + path, timeout=PATIENCE)
        assert found.status_code == status and found.json()["error"]["message"]
        assert "set-cookie" not in found.headers
    answer = server.raw(request("/health", b"", "GET", X_Request_Id="a b\tc"))
    assert answer.startswith(b"HTTP/1.1 200") and b"a b" not in answer


def test_text_of_any_language_is_a_prompt(server):
    for prompt in (
        "\U0001f469\u200d\U0001f4bb",
        "\u05e9\u202e",
        "e\u0301" * 9,
        "\0",
        "\uffff",
    ):
        found = server.post("/v1/completions", ASK | {"prompt": prompt, "echo": True})
        assert found.json()["choices"][0]["text"].startswith(prompt)
    half = server.post(
        "/v1/completions", content=b'{"model":"base","prompt":"\\ud800"}'
    )
    assert half.status_code == 400
    names = server.post("/v1/completions", ASK | {"model": "\u05e9\r\nx"})
    assert names.status_code == 404 and "base" in names.json()["error"]["message"]


def test_connections_that_are_dropped_leave_nothing(server):
    files = psutil.Process().num_fds()
    drop_connections(server.port, 60)
    # Requests of those that are gone may still be read, and fill the queue.
    wait_until(lambda: server.post("/v1/completions", ASK).status_code == 200)
    wait_until(lambda: psutil.Process().num_fds() <= files + 3)
    wait_until(lambda: not server.state.open_answers)


def test_who_leaves_gives_up_his_slot_and_his_place(server):
    engine = server.deployment.engine
    tasks = engine._slots.tasks
    for body in (ENDLESS, ENDLESS | {"stream": False}):
        with held(server):
            connection = server.socket()
            connection.sendall(request("/v1/chat/completions", body))
            wait_until(lambda: engine.stats().running == SLOTS)
            before = engine.stats().new_tokens
            connection.close()
            wait_until(lambda: all(x.answer.cancelled for x in tasks if x))
        server.idle()
        # The round that was under way.
        assert engine.stats().new_tokens - before <= SLOTS


def test_slots_say_what_they_do_and_no_text(server):
    with held(server), server.socket() as connection:
        assert server.get("/slots?fail_on_no_slot=1").status_code == 200
        connection.sendall(request("/v1/chat/completions", ENDLESS))
        slot = lambda: server.get("/slots").json()[0]  # noqa: E731
        wait_until(lambda: server.deployment.engine.stats().running == SLOTS)
        wait_until(lambda: slot().get("n_prompt_tokens_processed", 0) > 1)
        found = slot()
        tokens = found.pop("n_prompt_tokens")
        assert found.pop("n_prompt_tokens_cache") in range(tokens)
        counts = found.pop("next_token")
        assert counts.keys() == {"n_decoded", "n_remain"}
        assert found == {
            "id": 0, "n_ctx": CONTEXT, "is_processing": True, "model": "base",
            "n_prompt_tokens_processed": tokens,
        }  # fmt: skip
        assert sum(counts.values()) == CONTEXT - tokens
        assert server.get("/slots?fail_on_no_slot=1").status_code == 503
    server.idle()
    assert server.get("/slots").json()[1] == {
        "id": 1, "n_ctx": CONTEXT, "is_processing": False,
    }  # fmt: skip


def test_who_does_not_read_holds_nobody_up(server):
    connection = server.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    much = ENDLESS | {"logprobs": True, "top_logprobs": 20}
    connection.sendall(request("/v1/chat/completions", much))
    stats = server.deployment.engine.stats
    before = stats().new_tokens
    wait_until(lambda: stats().new_tokens > before)
    assert works(server)
    server.idle()  # Its slots are free, though nothing has been read.
    connection.close()


def test_a_full_queue_says_when_to_come_again(server):
    async def ask_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            asked = [
                asyncio.create_task(client.post("/v1/completions", json=LONG))
                for _ in range(24)
            ]
            with held(server):
                while sum(x.done() for x in asked) < 24 - SLOTS - QUEUE:
                    await asyncio.sleep(0.01)
            return await asyncio.gather(*asked)

    found = asyncio.run(ask_all())
    refused = [x for x in found if x.status_code == 429]
    answered = [x for x in found if x.status_code == 200]
    assert (len(answered), len(refused)) == (SLOTS + QUEUE, 24 - SLOTS - QUEUE)
    for each in refused:
        assert 1 <= int(each.headers["retry-after"]) <= 600
        assert each.json()["error"]["code"] == "queue_full"
    # A list of more prompts than the queue has places is no reason to refuse it.
    many = server.post("/v1/completions", ASK | {"prompt": ["a"] * (3 * QUEUE)})
    assert len(many.json()["choices"]) == 3 * QUEUE


def test_a_page_in_a_browser_reaches_nothing(server):
    evil = {"origin": "https://evil.example", "content-type": "text/plain"}
    assert server.post("/v1/completions", ASK, headers=evil).status_code == 403
    assert server.get("/health", headers={"host": "evil.example"}).status_code == 403
    assert "access-control-allow-origin" not in server.get("/v1/models").headers


def test_paths_of_adapters_outside_the_allowed_folder_are_not_opened(server, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for path in (
        "/etc",
        str(tmp_path),
        "../../..",
        "~",
        "a\0b",
        "x" * 5000,
        "hub://a/b",
    ):
        body = {"lora_name": "a", "lora_path": path}
        found = server.post("/v1/load_lora_adapter", body)
        assert (
            found.status_code == 403 and found.json()["error"]["param"] == "lora_path"
        )
    for name in ("", "a b", "a\nb", "x" * 200, "base"):
        body = {"lora_name": name, "lora_path": "/etc"}
        assert server.post("/v1/load_lora_adapter", body).status_code == 400
    for name in ("nobody", "base"):
        body = {"lora_name": name}
        assert server.post("/v1/unload_lora_adapter", body).status_code == 404


class Loading:
    """Opens nothing before `go`, and then raises `error`."""

    def __init__(self, error):
        self.go, self.error = threading.Event(), error

    def __call__(self):
        self.go.wait(PATIENCE)
        raise self.error


def test_a_server_listens_while_it_loads_and_says_why_it_cannot():
    loading = Loading(UserError("no such run"))
    keys = ApiKeys.from_text("k" * 20, "keys")
    server = LiveServer(loading, keys)
    try:
        key = {"authorization": f"Bearer {'k' * 20}"}
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["error"]["code"] == "loading"
        assert "retry-after" in health.headers
        assert server.post("/v1/completions", ASK).status_code == 401
        found = server.post("/v1/completions", ASK, headers=key)
        assert found.status_code == 503
        assert server.get("/metrics", headers=key).status_code == 200
        loading.go.set()
        wait_until(lambda: server.error)
        assert server.error is loading.error
    finally:
        loading.go.set()
        server.stop()


@pytest.fixture
def own_server(tmp_path, live):
    """A server that a test may stop; `live` has compiled its programs."""
    folder = make_tiny_model(tmp_path / "model")
    server = LiveServer(lambda: open_tiny(folder), grace=300.0).ready()
    yield server
    server.stop()


def test_a_stop_lets_answers_end_and_takes_no_new_ones(own_server):
    body = LONG | {"stream": True, "stream_options": {"include_usage": True}}
    url = f"{own_server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        next(lines)
        own_server.begin_stop()
        wait_until(lambda: own_server.state.is_stopping)

        def is_refused():
            return own_server.post("/v1/completions", ASK).status_code != 503

        with pytest.raises(httpx.HTTPError):  # The socket closes at the next tick.
            assert not wait_until(is_refused)
        rest = [x for x in lines if x]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == CONTEXT - 1
    wait_until(lambda: not own_server._thread.is_alive())
    assert own_server.error is None


def test_a_second_stop_ends_answers_with_an_error_that_clients_read(own_server):
    """At once: a round of the engine may take long."""
    ended, launch = threading.Event(), own_server.deployment.engine._decoder.launch
    rounds = itertools.count()
    own_server.deployment.engine._decoder.launch = lambda: (
        (next(rounds) < 2 or ended.wait(PATIENCE)) and launch()
    )
    with openai.OpenAI(base_url=f"{own_server.url}/v1", api_key="k") as client:
        stream = client.completions.create(
            model="base", prompt="a", max_tokens=100, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(stream)
        own_server.begin_stop()
        own_server.begin_stop()
        with pytest.raises(openai.APIError, match="the server stops"):
            list(stream)
        ended.set()
    wait_until(lambda: not own_server._thread.is_alive())
    assert own_server.error is None


def test_a_failed_engine_ends_streams_with_an_error_and_the_server(own_server):
    launch, rounds = own_server.deployment.engine._decoder.launch, itertools.count()
    heard = threading.Event()

    def broken():
        if next(rounds) < 2:
            return launch()
        heard.wait(PATIENCE)
        raise RuntimeError("the device is gone")

    own_server.deployment.engine._decoder.launch = broken
    url = f"{own_server.url}/v1"
    client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
    stream = client.completions.create(
        model="base", prompt="a", max_tokens=100, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(stream)
    heard.set()
    with pytest.raises(openai.APIError, match="the device is gone"):
        list(stream)
    client.close()
    wait_until(lambda: not own_server._thread.is_alive())
    assert "the device is gone" in str(own_server.error)


def test_a_port_or_socket_file_in_use_is_named(tmp_path):
    with open_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"{port}.*another process listens"):
            open_port("127.0.0.1", port)
    for host in ("256.1.1.1", "no.such.host.invalid", "8.8.8.8"):
        with pytest.raises(UserError, match=re.escape(host)):
            open_port(host, 0)
    path = tmp_path / "s"
    with open_unix_socket(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UserError, match="another process"):
            open_unix_socket(path)
    open_unix_socket(path).close()  # The file of a dead server is replaced.
    path.unlink()
    path.write_text("mine")
    with pytest.raises(UserError, match="no socket"):
        open_unix_socket(path)
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match="cannot be made"):
        open_unix_socket(tmp_path / ("x" * 200))
