"""The data page: files below the roots, columns, uploads, and what a check finds."""

import itertools
import json
import re

import numpy as np
import pytest
from studio_place import make_survey
from tiny_model import make_tiny_model
from waiting import wait_until

from research.studio.checks import __main__ as checks_door
from research.studio.checks import check_process
from research.studio.checks.check_process import Checks
from research.studio.checks.config_presets import first_preset
from research.studio.checks.row_survey import (
    BLOCK,
    histogram,
    read_survey,
)

ROW = {"question": "What is <b>red</b>?", "reply": "A colour.", "kind": "plain"}


@pytest.fixture
def file(site):
    path = site.data / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\nno JSON\n")
    return path


@pytest.fixture
def started(monkeypatch):
    """The flags of the checks that are started; none is run."""
    found = []
    monkeypatch.setattr(
        Checks, "start", lambda self, flags, rows_only, first: found.append(flags)
    )
    return found


def test_columns_are_chosen_from_those_of_the_file(site, file, started):
    client = site.client()
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
def test_no_file_outside_is_read(site, file, started, name):
    client = site.client()
    page = client.get("/data", params={"file": name}).text
    assert "Look at the rows" not in page
    assert client.post("/act/look", data={"file": name}).status_code in (403, 404)
    assert started == []


def test_a_link_that_leads_out_is_not_listed(site, tmp_path):
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (site.data / "linked.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert "linked.jsonl" not in site.client().get("/data").text


def test_an_upload_is_written_and_named_once(site):
    client = site.client(origin="http://127.0.0.1:8700", accept="application/json")
    answer = client.put("/act/upload/new.csv", content=b"question,reply\na,b\n")
    assert answer.json()["file"] == "data/new.csv"
    assert (site.data / "new.csv").read_bytes() == b"question,reply\na,b\n"
    assert client.put("/act/upload/new.csv", content=b"x").status_code == 409
    assert client.put("/act/upload/new.exe", content=b"x").status_code == 400
    assert '"action": "upload"' in (site.runs / ".studio/audit.jsonl").read_text()


def script(monkeypatch, code):
    """Lets checks run a program in place of the doctor."""
    monkeypatch.setattr(
        check_process,
        "checking",
        lambda flags, into, rows_only, first: ["", "-c", code % into],
    )


def ended(checks, flags=(), rows_only=True):
    wait_until(lambda: checks.read(flags, rows_only=rows_only).state != "running")
    return checks.read(flags, rows_only=rows_only)


def test_what_a_check_finds_is_read_from_its_files(site, monkeypatch):
    findings = {"findings": [{"name": "rows", "text": "2: <i>a</i>", "ok": False}]}
    spans = [{"ids": [1], "text": "ask", "trained": False}]
    spans += [{"ids": [2], "text": "<u>", "trained": True}]
    document = {"group": "", "where": "rows.jsonl:1", "spans": spans}
    rows = {"rows": [{"documents": [document]}]}
    code = "import pathlib; p = pathlib.Path(%r)\n"
    code += f"(p / 'preview.json').write_text({json.dumps(rows)!r})\n"
    code += f"(p / 'doctor.json').write_text({json.dumps(findings)!r})\n"
    script(monkeypatch, code.replace("%r", "'%s'"))
    client = site.client()
    at = client.post("/act/look", data={"file": "embedded"}).next_request.url
    checks = site.state.checks
    flags = ["--config=configs/finetune_dolly.py", "--config.data.path=embedded"]
    found = ended(checks, flags)
    assert found.is_red
    page = client.get(at).text
    assert "ask<mark>&lt;u&gt;</mark>" in page
    assert "2: &lt;i&gt;a&lt;/i&gt;" in page and "rows.jsonl:1" in page


def test_a_check_that_fails_says_why_and_a_new_one_ends_the_last(tmp_path, monkeypatch):
    checks = Checks(tmp_path)
    script(monkeypatch, "import time; time.sleep(600) # %s")
    checks.start(["slow"], rows_only=True)
    assert checks.read(["slow"], rows_only=True).state == "running"
    script(monkeypatch, "raise SystemExit('error: no such column') # %s")
    checks.start(["bad"], rows_only=True)
    stopped = checks.read(["slow"], rows_only=True)
    assert (stopped.state, stopped.is_red) == ("interrupted", False)
    assert "ended by another" in stopped.problem
    found = ended(checks, ["bad"])
    assert (found.problem, found.is_red) == ("no such column", True)
    assert checks.read(["never"], rows_only=True).state == "absent"


def test_a_look_at_rows_does_not_end_the_check_of_a_start(tmp_path, monkeypatch):
    checks = Checks(tmp_path)
    script(monkeypatch, "import time; time.sleep(600) # %s")
    checks.start(["x"], rows_only=False)
    checks.start(["x"], rows_only=True)
    try:
        assert checks.read(["x"], rows_only=False).state == "running"
        assert checks.read(["x"], rows_only=True).state == "running"
    finally:
        script(monkeypatch, "# %s")
        for rows_only in (False, True):
            checks.start(["done"], rows_only=rows_only)
            ended(checks, ["done"], rows_only)


# -- all rows ------------------------------------------------------------------------


def test_all_rows_are_paged_with_bounded_work_for_each_page(site, started):
    flags = ["--config=configs/finetune_dolly.py", "--config.data.path=embedded"]
    make_survey(site.state.checks, flags)
    make_survey(site.state.checks, flags, BLOCK)
    client = site.client()

    def places(at):
        return re.findall(r"row-(\d+)", client.get(f"/data?file=embedded{at}").text)

    assert places("") == [str(n) for n in range(10)]
    assert places("&at=195") == [str(n) for n in range(190, 200)]
    assert places("&at=200") == [str(n) for n in range(200, 210)]
    page = client.get("/data?file=embedded").text
    assert "at=10#rows" in page and 'rel="prev"' not in page
    assert "ask<mark>&lt;u&gt;</mark>" in page
    assert "rows.jsonl:7: &lt;i&gt;empty" in page and "b:2 is &lt;b&gt;:1" in page
    assert "<strong>3 rows were too long" in page
    # The next block has not been read: a button reads it.
    beyond = client.get("/data?file=embedded&at=400").text
    assert "Read the rows from 401 on" in beyond and not places("&at=400")
    for at in ("&at=-1", "&at=x", "&at=٣"):
        assert places(at)[0] == "0"
    assert client.post("/act/look", data={"file": "embedded", "at": "400"}).is_redirect
    assert started == [flags]


def test_lengths_are_counted_up_to_the_limit():
    found = histogram(np.array([1, 4, 5, 64, 64]), 63)
    assert found[0] == (1, 4, 2) and found[1] == (5, 8, 1) and found[-1] == (61, 64, 2)
    assert sum(rows for *_, rows in found) == 5
    for seq_len in (1, 15, 16, 17, 100, 8192):
        found = histogram(np.arange(1, seq_len + 2), seq_len)
        assert found[0][0] == 1 and found[-1][1] == seq_len + 1 and len(found) <= 16
        assert all(x[1] + 1 == y[0] for x, y in itertools.pairwise(found))
        assert all(most - least + 1 == rows for least, most, rows in found)


def test_a_check_of_rows_writes_what_the_page_shows(tmp_path, monkeypatch):
    make_tiny_model(tmp_path / "model")
    rows = [{"instruction": f"say {n % 20}", "response": "yes"} for n in range(24)]
    rows[5]["response"], rows[6]["response"] = "", "long " * 40
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    flags = {
        **{"model.init_from": tmp_path / "model", "text.cache_dir": tmp_path / "cache"},
        **{"data.path": tmp_path / "rows.jsonl", "data.seq_len": 48, "steps": 1},
        **{"data.batch_size": 1, "data.held_out": 4, "run_dir": tmp_path / "run"},
        **{"data.microbatch_size": 0, "epochs": 0, "data.overlength": "drop"},
    }
    into = tmp_path / "into"
    words = [f"--config.{name}={value}" for name, value in flags.items()]
    door = ["checks", f"--into={into}", "--rows_only", "--first=3"]
    assert checks_door.main([*door, f"--config={first_preset()}", *words]) == 0
    found = read_survey(into)
    assert (found.total, found.first, found.too_long) == (18, 3, 1)
    (shown,) = zip(*(row.documents for row in found.rows), strict=True)
    assert len({row.where for row in shown}) == 15
    assert found.copy_count == 4 and found.left_out_count == 2
    assert all("yes" in row.spans[-1].text for row in shown)
    assert all(row.spans[-1].trained for row in shown)


def test_a_check_of_raw_text_writes_all_of_its_rows(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b", "c"):
        text = "".join(f"Line {n} of a note.\n" for n in range(20 + (name == "c")))
        (texts / f"{name}.txt").write_text(text)
    flags = {
        **{"text.sources": f"('notes={texts}',)", "text.tokenizer": "byte"},
        **{"text.cache_dir": tmp_path / "cache", "text.held_out_share": 0},
        **{"data.seq_len": 32, "data.batch_size": 2, "run_dir": tmp_path / "run"},
    }
    into = tmp_path / "into"
    words = [f"--config.{name}={value}" for name, value in flags.items()]
    door = ["checks", f"--into={into}", "--rows_only", "--first=5"]
    assert checks_door.main([*door, "--config=configs/pretrain_tiny.py", *words]) == 0
    found = read_survey(into)
    assert found.total > 30 and len(found.rows) == found.total - 5
    assert found.rows[0].documents[0].where == "training row 6, document 1"
    assert found.longest == 33 and found.lengths[-1][2] == found.total
    assert list(map(tuple, found.copies)) == [
        ("notes, document 2", "notes, document 1")
    ]


SOURCES = "--config.text.sources="


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"hub": "owner/name"}, ["--config.data.path=hub://owner/name"]),
        ({"hub": "hub://a/b@main"}, ["--config.data.path=hub://a/b@main"]),
        (
            {"file": "data/notes.md"},
            ["--config.text.sources=('notes={data}/notes.md',)"],
        ),
        ({"file": "data", "read": "text"}, ["--config.text.sources=('data={data}',)"]),
    ],
)
def test_the_hub_folders_and_raw_text_are_sources(site, started, fields, flags):
    (site.data / "notes.md").write_text("# Notes\n")
    client = site.client()
    assert client.post("/act/look", data=fields).is_redirect
    preset, *found = started[0]
    assert found == [flag.format(data=site.data) for flag in flags]
    assert ("pretrain_tiny" in preset) == ("text" in flags[0])
    assert "Look at the" in client.get("/data", params=fields).text


def test_raw_text_outside_of_the_roots_is_refused_on_the_train_page(site):
    flags = "--config=configs/pretrain_tiny.py --config.text.sources=\"('x=/etc',)\""
    assert (
        "lies outside of" in site.client().get("/train", params={"flags": flags}).text
    )
