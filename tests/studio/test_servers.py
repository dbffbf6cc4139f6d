"""Served models as jobs, and the way from a page to them."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from fake_upstream import (
    CARDS,
    FakeUpstream,
    chunk,
    head,
    list_server,
    reply,
    said_by_models,
)
from served_studio import ServedStudio
from studio_place import StudioPlace, make_run
from waiting import PATIENCE, wait_until

from research.studio.jobs import job_commands
from research.studio.serving import server_client

EVENTS = head(200, "text/event-stream", transfer_encoding="chunked")
ASK = {"model": "base", "messages": [], "stream": True}
PATH = "/api/servers/hand/v1/chat/completions"


@pytest.fixture
def upstream(site, socket_folder):
    """Lists a server `hand` that answers as a test says."""
    started = []

    def make(answer):
        fake = FakeUpstream(socket_folder / "socket", answer)
        started.append(fake)
        keys = socket_folder / "keys"
        keys.write_text(
            f"# ours\na-key-of-a-user-1\nadmin sha256:{'0' * 64}\n"
            "admin the-key-of-an-admin # of the studio\n"
        )
        servers = site.runs / ".studio" / "servers"
        list_server(servers, "hand", uds=str(fake.path), key_file=str(keys))
        return fake

    yield make
    for fake in started:
        fake.stop()


def post(site, body=ASK, path=PATH):
    return site.client(accept="application/json").post(path, json=body)


def test_a_stream_comes_through_with_the_servers_key_and_not_the_browsers(
    site, upstream
):
    def answer(connection, fake):
        connection.sendall(EVENTS + chunk("data: {}\n\n") + chunk("data: [DONE]\n\n"))
        connection.sendall(b"0\r\n\r\n")

    fake = upstream(answer)
    found = post(site)
    assert found.text == "data: {}\n\ndata: [DONE]\n\n"
    assert found.headers["content-type"] == "text/event-stream"
    ((top, body),) = fake.requests
    assert "authorization: Bearer the-key-of-an-admin" in top
    assert "cookie" not in top.lower() and json.loads(body) == ASK


@pytest.mark.parametrize("end", [b"", b"5\r\nda"], ids=["between", "within"])
def test_a_server_that_dies_in_a_stream_is_an_event_and_no_end(site, upstream, end):
    def answer(connection, fake):
        connection.sendall(EVENTS + chunk('data: {"a": 1}\n\n') + end)

    upstream(answer)
    found = post(site)
    first, *_, last = filter(None, found.text.split("\n\n"))
    assert first == 'data: {"a": 1}'
    error = json.loads(last.removeprefix("data: "))["error"]["message"]
    assert error == "the server hand ended in the middle of an answer"
    assert "[DONE]" not in found.text


def test_a_refusal_keeps_its_status_its_words_and_when_to_come_again(site, upstream):
    body = '{"error": {"message": "the queue is full"}}'

    def answer(connection, fake):
        sent = head(429, "application/json", retry_after=7, content_length=len(body))
        connection.sendall(sent + body.encode())

    upstream(answer)
    found = post(site)
    assert (found.status_code, found.headers["retry-after"]) == (429, "7")
    assert found.json()["error"]["message"] == "the queue is full"


def test_a_key_that_the_server_refuses_does_not_look_like_the_browsers(site, upstream):
    body = "{}"

    def answer(connection, fake):
        sent = head(401, "application/json", content_length=2)
        connection.sendall(sent + body.encode())

    upstream(answer)
    found = post(site)
    assert found.status_code == 502 and "refuses its key" in found.json()["error"]


def test_a_silent_server_is_given_up(site, upstream, monkeypatch):
    monkeypatch.setattr(server_client.asking.__wrapped__, "__defaults__", (None, 0.05))
    ended = threading.Event()
    upstream(lambda connection, fake: ended.wait(PATIENCE))
    found = post(site)
    ended.set()
    assert found.status_code == 502 and "silent for 0.05 s" in found.json()["error"]


def test_the_server_stops_answering_when_the_browser_is_gone(site, upstream):
    def answer(connection, fake):
        connection.sendall(EVENTS)
        wait_until(lambda: connection.sendall(chunk(": ping\n\n")))

    fake = upstream(answer)
    cookies = dict(site.client().cookies)
    name = next(iter(cookies)).rpartition("_")[0]
    studio = ServedStudio(site.app)
    try:
        cookies = {f"{name}_{studio.port}": next(iter(cookies.values()))}
        with httpx.stream(
            "POST", studio.url + PATH, json=ASK, cookies=cookies
        ) as answer:
            next(answer.iter_raw())
        assert fake.broken.wait(PATIENCE)
    finally:
        studio.stop()


@pytest.mark.parametrize(
    "path, status",
    [
        ("hand/v1/load_lora_adapter", 404),
        ("hand/v1/../v1/models", 404),
        ("absent/v1/completions", 404),
        ("../x/v1/completions", 404),
        ("%2e%2e/v1/completions", 404),
    ],
)
def test_only_paths_that_answer_are_forwarded(site, upstream, path, status):
    fake = upstream(lambda connection, fake: None)
    assert post(site, path=f"/api/servers/{path}").status_code == status
    assert fake.requests == []


def test_a_server_that_is_gone_or_damaged_is_said(site):
    servers = site.runs / ".studio" / "servers"
    list_server(servers, "gone", uds="/absent/socket")
    list_server(servers, "odd", port="80")
    (servers / "linked").symlink_to(servers / "gone")
    client = site.client(accept="application/json")
    found = {x["name"]: x for x in client.get("/api/servers").json()}
    states = {name: x["state"] for name, x in found.items()}
    # Nobody can say that a server has ended whose process is not known.
    assert states == {"gone": "unreachable", "odd": "ended", "linked": "ended"}
    assert "cannot be reached" in found["gone"]["said"]
    assert (
        "cannot be used" in found["odd"]["said"] and "link" in found["linked"]["said"]
    )
    for name in ("gone", "odd", "linked"):
        path = f"/api/servers/{name}/v1/completions"
        assert client.post(path, json={}).status_code == 502
    form = {"server": "gone", "action": "stop"}
    answer = client.post("/act/server", data=form)
    assert "started by hand" in answer.json()["error"]
    assert client.post("/act/server", data=form | {"action": "x"}).status_code == 400


PROGRAM = """
import signal, sys, time
print("reading the base model", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("error: no room\\n  use less")))
time.sleep(600)
"""


@pytest.fixture
def started(site, monkeypatch, tmp_path):
    """Servers whose process is a program of one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "research.studio.serving.model_servers.serving",
        lambda flags, port, keys: ["python", "-c", PROGRAM, *flags, f"--port={port}"],
    )
    servers = site.state.servers
    yield servers
    for server in servers.all():
        if server.process:
            server.process.kill()
    for child in servers._children:
        child.wait()


def test_a_server_outlives_the_studio_and_is_found_again(site, started):
    server = started.start("first", ["--slots=2"], "me")
    with pytest.raises(ValueError, match="runs already"):
        started.start("first", [], "me")
    second = started.start("second", [], "me")
    assert second.port != server.port
    again = StudioPlace(site.runs.parent)  # A studio that was started anew.
    client = again.client(accept="application/json")

    def states():
        return {x["name"]: x for x in client.get("/api/servers").json()}

    wait_until(lambda: states()["first"]["said"] == "reading the base model")
    assert states()["first"]["state"] == "loading"
    assert os.getsid(server.pid) == server.pid, "it has a session of its own"
    mode = stat.S_IMODE((server.folder / "keys").stat().st_mode)
    assert mode == 0o600 and server.key() not in json.dumps(states())
    removal = {"server": "first", "action": "remove"}
    assert client.post("/act/server", data=removal).status_code == 400
    form = {"server": "first", "action": "stop"}
    assert client.post("/act/server", data=form).headers["location"].startswith("/chat")
    wait_until(lambda: states()["first"]["state"] == "ended")
    assert states()["first"]["said"] == "no room\n  use less"
    assert client.post("/act/server", data=form).status_code == 400
    key = server.key()
    renewed = again.state.servers.start("first", [], "me")
    assert (renewed.key(), renewed.port) == (key, server.port), "clients stay valid"
    psutil.Process(renewed.pid).send_signal(signal.SIGKILL)
    wait_until(lambda: states()["first"]["state"] == "ended")
    assert client.post("/act/server", data=removal).status_code == 303
    assert states().keys() == {"second"}
    actions = [line["action"] for line in again.state.audit.read()]
    assert actions.count("stop server") == 2 and "remove server" in actions


def test_the_command_is_that_of_a_shell_and_holds_no_other_flag(site, monkeypatch):
    monkeypatch.chdir(site.runs.parent)
    words = site.state.servers.command("a", ["--run=runs/x@3", "--context=512"])
    assert words[:-2] == [
        *(job_commands.python(), "-m", "research.serve"),
        *("--run=runs/x@3", "--context=512"),
    ]
    assert words[-1] == "--api_key_file=runs/.studio/servers/a/keys"
    assert sys.executable.endswith(Path(words[0]).name)
    assert "--port=99" in site.state.servers.command("a", ["--port=99"])
    for bad in ("--port=0", "--port=x", "--port=65536"):
        with pytest.raises(ValueError, match="is no port"):
            site.state.servers.command("a", [bad])
    for bad in ("--host=0.0.0.0", "--uds=x", "--run", "runs/x", "--help"):
        with pytest.raises(ValueError, match="is no flag for this"):
            site.state.servers.command("a", [bad])
    for bad in ("", "..", "a/b", ".a", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="is no name"):
            site.state.servers.command(bad, [])


def test_runs_of_a_server_lie_below_the_roots(site, monkeypatch):
    from starlette.requests import Request

    from research.studio.page_errors import PageError
    from research.studio.serving.server_routes import run_flags

    monkeypatch.chdir(site.runs.parent)
    make_run(site.runs / "a")
    request = Request({"type": "http", "app": site.app})
    found = run_flags(request, ["runs/a", "runs/a@30", "runs/a@best"])
    assert found == ["--run=runs/a", "--run=runs/a@30", "--run=runs/a@best"]
    for bad in ("/etc", "runs/../../etc@3", "runs/b", "runs/a@9/../.."):
        with pytest.raises(PageError):
            run_flags(request, [bad])


ASKED = {"server": "hand", "model": "base", "text": "Why?"}
UNLOADED = {"server": "hand", "action": "unload", "name": "x"}
CHATS = ("/chat?server=hand", "/api/stamps/hand")
FIGURES = ("/deploy/hand", "/api/served/hand")
# The path at which something answers what is none of ours, and the pages that ask it.
ODD_ANSWERS = [
    ("/", {}, (*CHATS, *FIGURES, "/api/servers")),
    ("/health", [], (*CHATS, *FIGURES, "/api/servers")),
    ("/v1/models", {}, (*CHATS, "/deploy/hand")),
    ("/v1/models", {"data": [CARDS[0] | {"parent": []}]}, CHATS),
    ("/tokenizer_info", {"chat_template": 3}, CHATS),
    ("/slots", [3], FIGURES),
    ("/v1/chat", {"choices": []}, ()),
]


def test_another_program_at_the_address_of_a_server_breaks_no_page(site, upstream):
    def answer(connection, fake):
        asked = fake.requests[-1][0].split()[1]
        if asked.startswith(path):
            reply(connection, odd)
        elif asked == "/metrics":
            text = b"research:x NaN\nresearch:generation_tokens_total x"
            connection.sendall(head(200, "text/plain") + text)
        else:
            said_by_models(connection, fake)

    path, odd = "/absent", None
    fake, client = upstream(answer), site.client()
    assert client.get("/api/served/hand").json()["figures"]["tokens"] == 0
    for path, odd, pages in ODD_ANSWERS:
        found = client.post("/act/chat/ask", data=ASKED)
        assert found.status_code == (303 if path in ("/health", "/slots") else 502)
        for page in pages:
            assert client.get(page).status_code in (200, 502), (path, odd, page)
        if path in "/health":
            (said,) = client.get("/api/servers").json()
            assert said["state"] == "ended" and "is another program" in said["said"]
    tops = [top for top, _ in fake.requests if "/health" in top]
    assert tops and not any("authorization" in top for top in tops)


def test_a_server_that_has_ended_gets_no_request_and_no_key(site, upstream):
    """Another program may have its port, or its socket, by now."""
    fake = upstream(said_by_models)
    file = site.runs / ".studio" / "servers" / "hand" / "server.json"
    ended = subprocess.Popen(["true"])
    ended.wait()
    fields = json.loads(file.read_text()) | {"pid": ended.pid, "born": 1.0}
    file.write_text(json.dumps(fields))
    for path in ("/api/stamps/hand", "/api/servers/hand/v1/models", "/deploy/hand"):
        site.client().get(path)
    assert post(site).status_code == 502
    assert fake.requests == []


@pytest.mark.parametrize(
    "status, body, told",
    [
        (401, {"error": {"message": "a key, please"}}, 502),
        (302, {"error": {"message": "elsewhere"}}, 502),
        (404, {"error": "no"}, 502),
        (404, {"error": {"message": "no adapter x"}}, 404),
    ],
)
def test_only_an_error_of_ours_keeps_its_status(site, upstream, status, body, told):
    def answer(connection, fake):
        sent = json.dumps(body).encode()
        start = head(status, "application/json", content_length=len(sent))
        connection.sendall(start + sent)

    upstream(answer)
    found = site.client().post("/act/adapter", data=UNLOADED)
    assert found.status_code == told


ODD_FILES = [
    *({"pid": -1}, {"pid": 10**400}, {"pid": True}, {"command": 3}, {"began": 3}),
    *({"port": 10**400, "uds": "", "key_file": ""}, {"uds": "a\0"}, {"born": "x"}),
    {"key_file": "b\0"},
]


def test_a_damaged_file_of_a_server_or_of_its_keys_breaks_no_page(site, upstream):
    upstream(said_by_models)
    folder, client = site.runs / ".studio" / "servers" / "hand", site.client()
    good = json.loads((folder / "server.json").read_text())
    for odd in ODD_FILES:
        (folder / "server.json").write_text(json.dumps(good | odd))
        (said,) = client.get("/api/servers").json()
        assert "server.json cannot be used" in said["said"], odd
        assert client.get("/chat?server=hand").status_code == 200
    (folder / "server.json").write_text(json.dumps(good))
    for keys in (b"\xff", "admin schlüssel".encode()):
        Path(good["key_file"]).write_bytes(keys)
        found = client.get("/api/stamps/hand")
        assert found.status_code == 502 and "keys of server hand" in found.text
