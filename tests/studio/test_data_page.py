"""The data page: files below the roots, columns, uploads, and what a check finds."""

import json
import time

import pytest

from research.studio.checks import check_process
from research.studio.checks.check_process import Checks

ROW = {"question": "What is <b>red</b>?", "reply": "A colour.", "kind": "plain"}


@pytest.fixture
def file(place):
    path = place.data / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\nno JSON\n")
    return path


@pytest.fixture
def started(monkeypatch):
    """The flags of the checks that are started; none is run."""
    found = []
    monkeypatch.setattr(
        Checks, "start", lambda self, flags, rows_only: found.append(flags)
    )
    return found


def test_columns_are_chosen_from_those_of_the_file(place, file, started):
    client = place.client()
    page = client.get("/data?file=data/rows.jsonl").text
    assert '<option value="reply">' in page
    fields = {"file": "data/rows.jsonl", "instruction": "question", "skip": "yes"}
    answer = client.post("/act/look", data=fields)
    assert answer.status_code == 303
    assert started[0][1:] == [
        f"--config.data.path={file}",
        "--config.data.columns.instruction=question",
        "--config.data.bad_lines=skip",
    ]
    assert (
        '<option value="question" selected>' in client.get(answer.next_request.url).text
    )


@pytest.mark.parametrize("name", ["../rows.jsonl", "data/../../etc", "/etc/passwd"])
def test_no_file_outside_is_read(place, file, started, name):
    client = place.client()
    page = client.get("/data", params={"file": name}).text
    assert "Look at the rows" not in page
    assert client.post("/act/look", data={"file": name}).status_code in (403, 404)
    assert started == []


def test_a_link_that_leads_out_is_not_listed(place, tmp_path):
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (place.data / "linked.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert "linked.jsonl" not in place.client().get("/data").text


def test_an_upload_is_written_and_named_once(place):
    client = place.client(origin="http://127.0.0.1:8700", accept="application/json")
    answer = client.put("/act/upload/new.csv", content=b"question,reply\na,b\n")
    assert answer.json()["file"] == "data/new.csv"
    assert (place.data / "new.csv").read_bytes() == b"question,reply\na,b\n"
    assert client.put("/act/upload/new.csv", content=b"x").status_code == 409
    assert client.put("/act/upload/new.exe", content=b"x").status_code == 400
    assert '"action": "upload"' in (place.runs / ".studio/audit.jsonl").read_text()


def script(monkeypatch, code):
    """Lets checks run a program in place of the doctor."""
    monkeypatch.setattr(
        check_process,
        "checking",
        lambda flags, into, rows_only: ["", "-c", code % into],
    )


def ended(checks, flags=()):
    for _ in range(500):
        if (found := checks.read(flags, rows_only=True)).state != "running":
            return found
        time.sleep(0.02)
    raise AssertionError("the check does not end")


def test_what_a_check_finds_is_read_from_its_files(place, monkeypatch):
    findings = {"findings": [{"name": "rows", "text": "2: <i>a</i>", "ok": False}]}
    spans = [{"ids": [1], "text": "ask", "trained": False}]
    spans += [{"ids": [2], "text": "<u>", "trained": True}]
    document = {"group": "", "where": "rows.jsonl:1", "spans": spans}
    rows = {"rows": [{"documents": [document]}]}
    code = "import pathlib; p = pathlib.Path(%r)\n"
    code += f"(p / 'preview.json').write_text({json.dumps(rows)!r})\n"
    code += f"(p / 'doctor.json').write_text({json.dumps(findings)!r})\n"
    script(monkeypatch, code.replace("%r", "'%s'"))
    client = place.client()
    at = client.post("/act/look", data={"file": "embedded"}).next_request.url
    checks = place.state.checks
    flags = ["--config=configs/finetune_dolly.py", "--config.data.path=embedded"]
    found = ended(checks, flags)
    assert found.is_red
    page = client.get(at).text
    assert "ask<mark>&lt;u&gt;</mark>" in page
    assert "2: &lt;i&gt;a&lt;/i&gt;" in page and "rows.jsonl:1" in page


def test_a_check_that_fails_says_why_and_a_new_one_ends_the_last(tmp_path, monkeypatch):
    checks = Checks(tmp_path)
    script(monkeypatch, "import time; time.sleep(30) # %s")
    checks.start(["slow"], rows_only=True)
    assert checks.read(["slow"], rows_only=True).state == "running"
    script(monkeypatch, "raise SystemExit('error: no such column') # %s")
    checks.start(["bad"], rows_only=True)
    assert "ended by another" in checks.read(["slow"], rows_only=True).problem
    found = ended(checks, ["bad"])
    assert (found.problem, found.is_red) == ("no such column", True)
    assert checks.read(["never"], rows_only=True).state == "absent"
