"""`audit.jsonl`: every action has a line, and its outcome is true."""

import fcntl
import json

import pytest
from fake_upstream import FakeUpstream, list_server, reply, said_by_models
from studio_place import make_run

from research.studio.audit_log import AuditLog
from research.studio.chats.conversation_files import Conversations
from research.studio.checks.config_presets import first_preset
from research.studio.checks.page_process import PageProcesses
from research.studio.deploying import deploy_page
from research.studio.jobs.job_queue import JobQueue


def test_each_action_has_its_outcome(site):
    free, held = make_run(site.runs / "free"), make_run(site.runs / "held")
    client = site.client()
    with open(held / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        client.post("/act/trash", data={"run": ["runs/free", "runs/held"]})
        client.post("/act/resume", data={"run": "runs/held"})
    client.post("/act/notes", data={"run": "runs/held", "tags": "x", "notes": ""})
    client.post("/act/notes", data={"run": "runs/held", "tags": "x" * 99, "notes": ""})
    client.post("/act/queue", data={"job": "absent", "action": "up"})
    client.post("/act/empty-trash")
    found = [
        (x["action"], x["what"], x["outcome"][:8]) for x in site.state.audit.read()
    ]
    assert found == [
        ("trash", "runs/free", "done"),
        ("trash", "runs/held", "refused:"),
        ("start", "runs/held", "refused:"),
        ("notes", "runs/held", "done"),
        ("notes", "runs/held", "refused:"),
        ("up job", "absent", "refused:"),
        ("empty trash", "", "done"),
    ]
    assert site.state.audit.read()[-1]["runs"] == 1 and not free.exists()


def test_plans_and_checks_have_their_commands(site, monkeypatch):
    monkeypatch.setattr(site.state.plans, "start_plan", lambda *_: None)
    monkeypatch.setattr(site.state.plans, "start_dry_run", lambda *_: None)
    monkeypatch.setattr(site.state.checks, "start", lambda *_, **__: None)
    client = site.client()
    for kind in ("plan", "slurm"):
        form = {"start": kind, "flags": ""}
        assert client.post("/act/plan", data=form).status_code == 303
    assert client.post("/act/look", data={"file": "embedded"}).status_code == 303
    plan, dry_run, rows = site.state.audit.read()
    assert "research.plan" in plan["command"] and plan["outcome"] == "done"
    assert "--dry-run" in dry_run["command"] and dry_run["what"] == "slurm"
    assert (rows["action"], rows["what"]) == ("check rows", "embedded")


SWEEP = {"question": "Which?", "metric": "loss", "axes": [], "runs": []}
UPLOAD, CHAT_LINE = "/act/upload/{name}", "/api/chats"
# It answers, and changes nothing: no file, no model.
ANSWERS = {"/api/servers/{name}/{path:path}"}


@pytest.fixture
def full(site, monkeypatch, socket_folder):
    """A site in which every button has something to do, and starts no process."""
    monkeypatch.chdir(site.runs.parent)
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    monkeypatch.setattr(PageProcesses, "start", lambda *_, **__: None)
    monkeypatch.setattr(deploy_page, "_run", lambda command: None)
    monkeypatch.setattr(
        site.state.servers,
        "start",
        lambda name, flags, by: site.state.servers.find("hand"),
    )
    for name in ("gone", "live", "tuned"):
        run = make_run(site.runs / name)
        (run / "identity.json").write_text('{"base model": "x"}')
        (run / "checkpoints" / "3").mkdir(parents=True)
    site.job = site.state.queue.add(["true"], site.runs / "job", "me").id
    (site.runs / "ranks").mkdir()
    (site.runs / "ranks" / "sweep.json").write_text(json.dumps(SWEEP))

    def answer(connection, fake):
        if "lora_adapter" in fake.requests[-1][0]:
            reply(connection, {})
        else:
            said_by_models(connection, fake)

    fake = FakeUpstream(socket_folder / "hand", answer)
    servers = site.runs / ".studio" / "servers"
    (socket_folder / "keys").write_text("admin the-key-of-the-studio\n")
    keys = {"key_file": str(socket_folder / "keys")}
    list_server(servers, "hand", uds=str(fake.path), **keys)
    list_server(servers, "old", uds="/absent")
    with open(site.runs / "live" / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield site
    fake.stop()


def forms(site):
    """A form for each route that changes something, in this order."""
    train = f"--config={first_preset()} --config.run_dir=runs/new"
    sweep = f"--axis=lora.rank=4,8 -- --config={first_preset()}"
    served = {"name": "api", "run": "runs/tuned"}
    turn = {"kind": "turn", "text": "a", "parent": "", "chosen": ""}
    turn |= {"context": "", "system": ""}
    yield "/act/notes", {"run": "runs/tuned", "tags": "x", "notes": ""}
    yield "/act/trash", {"run": "runs/gone"}
    yield "/act/empty-trash", {}
    yield "/act/request", {"run": "runs/live", "kind": "stop"}
    yield "/act/resume", {"run": "runs/tuned"}
    yield "/act/branch", {"run": "runs/tuned", "step": "3", "target": "branch"}
    yield "/act/queue", {"job": site.job, "action": "remove"}
    yield "/act/look", {"file": "embedded"}
    yield UPLOAD, b"a,b\n1,2\n"
    yield "/act/check", {"flags": train}
    yield "/act/train", {"flags": train}
    yield "/act/evaluate", {"flags": "--run=runs/tuned"}
    yield "/act/sweep", {"flags": sweep}
    yield "/act/sweep-report", {"sweep": "runs/ranks"}
    yield "/act/plan", {"start": "plan", "flags": train}
    yield "/act/serve", served
    yield "/act/serve-again", {"server": "hand"}
    yield "/act/key", {"server": "hand", "action": "make", "name": "x", "role": "user"}
    yield "/act/adapter", {"server": "hand", "action": "unload", "name": "x"}
    yield "/act/server", {"server": "old", "action": "remove"}
    yield "/act/export", {"run": "runs/tuned", "format": "hf-float32"}
    yield "/act/promote", {"do": "promote", "alias": "prod", "run": "runs/tuned"}
    yield "/act/chat/serve", {"run": "runs/tuned"}
    asked = {"server": "hand", "model": ["base", "tuned"], "text": "Why?"}
    yield "/act/chat/ask", asked
    yield CHAT_LINE, {"chat": "", "line": turn}
    kept = Conversations(site.runs / ".studio" / "chats")
    chats = [kept.read(name) for name, _ in kept.all()]
    (chat,) = [x for x in chats if len(x.lines) == 2]
    answers = {"chat": chat.id, "answers": chat.lines[1]["id"]}
    yield "/act/vote", answers | {"winner": "tuned"}
    yield "/act/chat/rows", answers | {"model": "tuned", "file": "mine.jsonl"}
    yield "/act/chat/remove", {"chat": chat.id}


def test_every_route_that_changes_something_notes_it(full):
    """A new one needs a form here."""
    client, changing = full.client(), set()
    for route in full.app.routes:
        if getattr(route, "methods", None) and route.methods - {"GET", "HEAD"}:
            changing.add(route.path)
    done = []
    for path, form in forms(full):
        before = len(full.state.audit.read())
        if path == UPLOAD:
            found = client.put("/act/upload/a.csv", content=form)
        elif path == CHAT_LINE:
            found = client.post(path, json=form)
        else:
            found = client.post(path, data=form)
        assert found.status_code in (200, 303), (path, found.text)
        lines = full.state.audit.read()[before:]
        assert [x["outcome"] for x in lines] == ["done"], path
        assert lines[0]["who"].endswith("(admin)"), path
        done.append(path)
    assert sorted(done) == sorted(changing - ANSWERS)


def test_lines_of_earlier_versions_stay_readable(tmp_path):
    log = AuditLog(tmp_path)
    old = '{"time": "t", "action": "start", "what": "runs/a", "who": "me"}\n'
    log.path.write_text(old + old)
    with log.noting("stop", "runs/a", "me"):
        assert "outcome" not in log.read()[-1]  # It is cut off if the server ends now.
    assert [line.get("outcome") for line in log.read()] == [None, None, "done"]
