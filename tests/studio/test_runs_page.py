"""The list of runs: what a state is, search, notes, removal, and foreign text."""

import fcntl
import json
import os
import re
import shutil
import time

import pytest
from studio_place import StudioPlace, make_run, train_line

from research.studio.listing import run_state
from research.studio.listing.run_index import RunIndex
from research.studio.listing.run_state import HeldLocks, read_state
from research.studio.live.metric_columns import Cursor
from research.studio.pages.page_view import address, number_of
from research.studio.roots import Roots

XSS = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize("from_kernel", [True, False])
def test_a_run_whose_lock_is_held_runs(tmp_path, monkeypatch, from_kernel):
    if not from_kernel:
        monkeypatch.setattr(run_state, "LOCKS", tmp_path / "absent")
    run = make_run(tmp_path / "a", "finished")
    assert not HeldLocks().holds(run)
    with open(run / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert HeldLocks().holds(run)
    assert not HeldLocks().holds(run)
    assert not HeldLocks().holds(tmp_path / "absent")


def test_to_look_at_a_lock_never_keeps_a_trainer_out(tmp_path):
    run = make_run(tmp_path / "a")
    locks = HeldLocks()
    with open(run / "lock") as file:
        assert not locks.holds(run)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("end", ["stopped", "failed", "finished"])
def test_the_state_says_how_a_run_ended(tmp_path, end):
    state = read_state(make_run(tmp_path / "a", end), is_training=False)
    # A loss may end a run before its planned step.
    steps = 3 if end == "finished" else 5
    assert (state.state, state.step, state.steps) == (end, 3, steps)
    assert (state.loss, state.held_out) == (1.0, 3.5)


def test_a_run_that_cannot_be_seen_lives_while_it_writes(tmp_path):
    """Its job is on another machine, and its folder is mounted here."""
    run = make_run(tmp_path / "a", "killed")
    assert read_state(run, is_training=False).state == "running"
    for file in run.iterdir():
        os.utime(file, (0, time.time() - 2 * run_state.SILENT))
    assert read_state(run, is_training=False).state == "failed"


def test_a_damaged_history_is_named_and_the_list_is_whole(site):
    make_run(site.runs / "good")
    (make_run(site.runs / "bad") / "run.json").write_text("{")
    (make_run(site.runs / "worse") / "metrics.jsonl").write_bytes(b"\xff\0{]\n" * 9)
    text = site.client().get("/").text
    assert "run.json cannot be used" in text
    assert all(f'href="/run/runs/{name}"' in text for name in ("good", "bad", "worse"))


def test_search_reads_names_tags_and_notes(site):
    for name in ("alpha", "beta", "sweep/gamma"):
        make_run(site.runs / name)
    client = site.client()
    form = {"run": "runs/beta", "tags": "good, keep", "notes": "the Best one"}
    assert client.post("/act/notes", data=form).status_code == 303

    def names(query):
        text = client.get(query).text
        return [x for x in ("alpha", "beta", "gamma") if f"/{x}<" in text]

    found = {
        query: names(query)
        for query in ("/", "/?q=ALPHA", "/?q=keep", "/?q=best+one", "/?state=failed")
    }  # fmt: skip
    assert found == {
        "/": ["alpha", "beta", "gamma"],
        "/?q=ALPHA": ["alpha"],
        "/?q=keep": ["beta"],
        "/?q=best+one": ["beta"],
        "/?state=failed": [],
    }
    too_many = form | {"tags": " ".join(map(str, range(99)))}
    assert client.post("/act/notes", data=too_many).status_code == 400


def test_foreign_text_is_never_html(site):
    """Names, tags, notes, categories, causes, logs and samples come from anywhere."""
    line = train_line(1) | {"kind": "eval", f"loss/{XSS}": 1.0}
    run = make_run(site.runs / XSS, "failed", [line])
    record = json.loads((run / "run.json").read_text())
    record["starts"][0]["cause"] = record["starts"][0]["host"] = XSS
    record["events"] = [{"at": XSS, "what": XSS}]
    (run / "run.json").write_text(json.dumps(record))
    (run / "notes.json").write_text(json.dumps({"tags": [XSS], "notes": XSS}))
    finding = {"name": XSS, "text": XSS, "ok": False, "remedy": XSS}
    (run / "doctor.json").write_text(json.dumps({"ok": False, "findings": [finding]}))
    sample = {"step": 1, "prompt": XSS, "text": f"</pre>{XSS}"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (site.runs / f"{XSS}.log").write_text(f"{XSS}\n\x1b[31m\u202e{XSS}")
    make_run(site.runs / "b")
    client, name = site.client(), f"runs/{XSS}"
    pages = [
        client.get("/", params={"q": XSS[:9]}),
        client.get(f"/run/{name}"),
        client.get("/report", params={"run": name}),
        client.get("/compare", params={"run": [name, "runs/b"]}),
        client.get("/remove", params={"run": name}),
        client.get("/branch", params={"run": name, "target": XSS, "changes": XSS}),
        client.get("/run/absent", params={"said": XSS}),
        client.get("/queue", params={"said": XSS}),
    ]
    for page in pages:
        assert "<img" not in page.text and "\x1b" not in page.text
        assert "\u202e" not in page.text
    assert [page.status_code for page in pages] == [200] * 6 + [404, 200]
    assert all(page.text.count("&lt;img") >= 9 for page in pages[1:3])


def test_a_report_is_shown_as_it_is_but_can_do_nothing(site):
    """It is a file that anybody may have written."""
    run = make_run(site.runs / "a", "finished")
    client = site.client()
    (run / "report.html").write_text("<script>alert(1)</script><p>loss</p>")
    answer = client.get("/report?run=runs/a")
    policy = answer.headers["content-security-policy"]
    assert "<p>loss</p>" in answer.text and policy.startswith("sandbox; default-src")
    assert "script-src" not in policy and "allow-" not in policy
    (run / "report.html").unlink()
    (run / "report.html").symlink_to("/etc/passwd")
    assert client.get("/report?run=runs/a").status_code == 404


def test_a_removed_run_names_its_bytes_and_can_return(site):
    run = make_run(site.runs / "sweep" / "a")
    (site.runs / "sweep" / "a.log").write_text("log")
    client = site.client()
    asked = client.get("/remove", params={"run": "runs/sweep/a"}).text
    size = sum(file.stat().st_size for file in run.iterdir())
    assert f"{size:,} bytes move" in asked
    assert client.post("/act/trash", data={"run": "runs/sweep/a"}).status_code == 303
    assert not run.exists() and site.state.listed() == []
    (kept,) = (site.runs / ".trash").glob("*/sweep/a")
    assert (kept / "config.json").is_file()
    assert kept.with_name("a.log").read_text() == "log"
    (line,) = site.state.audit.read()
    assert (line["action"], line["what"]) == ("trash", "runs/sweep/a")
    assert line["bytes"] == size
    client.post("/act/empty-trash")
    assert not kept.exists()


def test_a_run_that_trains_or_is_needed_stays(site):
    run = make_run(site.runs / "a")
    client = site.client()
    with open(run / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answer = client.post("/act/trash", data={"run": "runs/a"})
        assert answer.status_code == 400 and "stop it first" in answer.text
    child = make_run(site.runs / "child")
    needs = {"base run": "a", "base step": "3"}
    (child / "identity.json").write_text(json.dumps(needs))
    (run / "needed_by").mkdir()
    pin = json.dumps({"folder": str(child), **needs})
    (run / "needed_by" / "x.json").write_text(pin)
    answer = client.post("/act/trash", data={"run": "runs/a"})
    assert answer.status_code == 400 and "is built on its step 3" in answer.text
    assert run.exists()


def test_a_folder_that_is_no_run_gets_no_notes_and_is_not_removed(site):
    (site.runs / "plain").mkdir()
    client = site.client()
    for name in ("runs/plain", "runs"):
        form = {"run": name, "tags": "x", "notes": ""}
        assert client.post("/act/notes", data=form).status_code == 404
        assert client.post("/act/trash", data=form).status_code == 404
        assert client.get("/remove", params=form).status_code == 404
    assert [*(site.runs / "plain").iterdir()] == [*site.runs.glob("*.json")] == []


def test_a_run_that_trains_elsewhere_or_whose_job_waits_stays(site, monkeypatch):
    """Its lock is held on another machine, or not yet."""
    monkeypatch.setattr(site.state.queue, "work", lambda: None)
    pod, free = make_run(site.runs / "pod", "killed"), make_run(site.runs / "free")
    client = site.client()
    for action in ("trash", "resume"):
        answer = client.post(f"/act/{action}", data={"run": "runs/pod"})
        assert answer.status_code == 400 and "on another machine" in answer.text
    assert site.state.queue.read().waiting == []
    site.state.queue.add(["true"], free / "evaluations", "me", name="evaluate free")
    answer = client.post("/act/trash", data={"run": "runs/free"})
    assert answer.status_code == 400 and "evaluate free runs or waits" in answer.text
    assert pod.exists() and free.exists()


@pytest.mark.parametrize("target", ["victim", "runs/sweep"])
def test_a_trash_that_is_a_link_is_never_followed(site, tmp_path, target):
    run = make_run(site.runs / "a")
    (tmp_path / target).mkdir()
    (tmp_path / target / "precious").mkdir()
    (site.runs / ".trash").symlink_to(tmp_path / target)
    client = site.client()
    assert client.post("/act/empty-trash").status_code == 400
    assert client.post("/act/trash", data={"run": "runs/a"}).status_code == 400
    assert [x.name for x in (tmp_path / target).iterdir()] == ["precious"]
    assert run.exists()


def test_a_link_in_the_trash_goes_and_its_target_stays(site, tmp_path):
    make_run(site.runs / "a")
    client = site.client()
    assert "The trash is empty" in client.get("/remove").text
    client.post("/act/trash", data={"run": "runs/a"})
    make_run(tmp_path / "outside")
    (site.runs / ".trash" / "link").symlink_to(tmp_path / "outside")
    assert "Delete 2 runs" in client.get("/remove").text
    assert client.post("/act/empty-trash").status_code == 303
    assert [*(site.runs / ".trash").iterdir()] == []
    assert (tmp_path / "outside" / "config.json").exists()


def test_a_run_that_is_removed_while_it_is_listed_is_no_error(site):
    index = RunIndex(Roots([str(site.runs)], "--runs"))
    make_run(site.runs / "a")
    assert len(index.runs()) == 1
    (site.runs / "a" / "identity.json").unlink()
    assert index.runs() == []
    assert site.client().get("/run/runs/a").status_code == 404


def test_200_runs_are_listed_at_once(tmp_path):
    """And what has not changed is not read again."""
    site = StudioPlace(tmp_path)
    first = make_run(tmp_path / "first")
    for number in range(200):
        shutil.copytree(first, site.runs / f"sweep-{number % 9}" / f"run-{number}")
    client = site.client()
    client.get("/")
    begun = time.process_time()
    text = client.get("/").text
    # The limit for users is 0.3 s on a quiet machine.
    assert time.process_time() - begun < 0.6
    assert text.count('data-run="') == 200


def test_a_name_of_any_letters_keeps_its_address(site):
    client, name = site.client(), "runs/a?b#c&d=e é"
    make_run(site.runs.parent / name)
    fields = {"run": name, "tags": "kept", "notes": ""}
    there = client.post("/act/notes", data=fields).headers["location"]
    shown = client.get(there)
    assert shown.status_code == 200 and ">kept<" in shown.text
    assert address("/run/a%41") == "/run/a%2541"  # Tests' clients decode it twice.


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "x", "²", "٣"])
def test_a_number_of_an_address_has_bounds(site, number):
    (site.data / "a.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    make_run(site.runs / "a")
    client = site.client()
    fields = {"file": "data/a.jsonl", "at": number}
    assert client.get("/data", params=fields).status_code == 200
    fields = {"run": "runs/a", "smooth": number}
    assert client.get("/api/curves", params=fields).status_code == 200
    assert 0 <= number_of(number, 50) <= 50
    assert Cursor.parse(f"{number}-0-0") is None


def test_a_page_paints_after_a_few_small_files(site):
    """Before its first paint a browser reads the page, its styles, and no script."""
    lines = [train_line(n) for n in range(1, 301)]
    make_run(site.runs / "a", lines=lines)
    make_run(site.runs / "b", lines=lines)
    client, compared = site.client(), "/compare?run=runs/a&run=runs/b"
    for path in ("/", "/run/runs/a", compared, "/data", "/train", "/chat", "/deploy"):
        page = client.get(path)
        scripts = re.findall(r"<script([^>]*)>", page.text)
        assert scripts and all('type="module"' in each for each in scripts), path
        styles = re.findall(r'<link rel="stylesheet" href="([^"]+)"', page.text)
        read = [page.content, *(client.get(style).content for style in styles)]
        assert len(read) <= 3 and sum(map(len, read)) < 150_000, path
