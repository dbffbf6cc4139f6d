"""`audit.jsonl`: every action has a line, and its outcome is true."""

import fcntl
import inspect

from studio_place import make_run

from research.studio.audit_log import AuditLog

# Their own files keep each of these.
OF_CHAT = {"/act/chat/ask", "/act/vote"}
NOTING = ("noted(", "enqueue(", "start_server(")


def test_each_action_has_its_outcome(place):
    free, held = make_run(place.runs / "free"), make_run(place.runs / "held")
    client = place.client()
    with open(held / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        client.post("/act/trash", data={"run": ["runs/free", "runs/held"]})
        client.post("/act/resume", data={"run": "runs/held"})
    client.post("/act/notes", data={"run": "runs/held", "tags": "x", "notes": ""})
    client.post("/act/notes", data={"run": "runs/held", "tags": "x" * 99, "notes": ""})
    client.post("/act/queue", data={"job": "absent", "action": "up"})
    client.post("/act/empty-trash")
    found = [
        (x["action"], x["what"], x["outcome"][:8]) for x in place.state.audit.read()
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
    assert place.state.audit.read()[-1]["runs"] == 1 and not free.exists()


def test_plans_and_checks_have_their_commands(place, monkeypatch):
    monkeypatch.setattr(place.state.plans, "start_plan", lambda *_: None)
    monkeypatch.setattr(place.state.plans, "start_dry_run", lambda *_: None)
    monkeypatch.setattr(place.state.checks, "start", lambda *_, **__: None)
    client = place.client()
    for kind in ("plan", "slurm"):
        form = {"start": kind, "flags": ""}
        assert client.post("/act/plan", data=form).status_code == 303
    assert client.post("/act/look", data={"file": "embedded"}).status_code == 303
    plan, dry_run, rows = place.state.audit.read()
    assert "research.plan" in plan["command"] and plan["outcome"] == "done"
    assert "--dry-run" in dry_run["command"] and dry_run["what"] == "slurm"
    assert (rows["action"], rows["what"]) == ("check rows", "embedded")


def test_every_page_that_changes_something_notes_it(place):
    acts = {
        route.path: inspect.getsource(route.endpoint)
        for route in place.app.routes
        if route.path.startswith("/act/") and "GET" not in route.methods
    }
    silent = {
        path for path, code in acts.items() if not any(name in code for name in NOTING)
    }
    assert len(acts) > 20 and silent <= OF_CHAT


def test_lines_of_earlier_versions_stay_readable(tmp_path):
    log = AuditLog(tmp_path)
    old = '{"time": "t", "action": "start", "what": "runs/a", "who": "me"}\n'
    log.path.write_text(old + old)
    with log.noting("stop", "runs/a", "me"):
        assert "outcome" not in log.read()[-1]  # It is cut off if the server ends now.
    assert [line.get("outcome") for line in log.read()] == [None, None, "done"]
