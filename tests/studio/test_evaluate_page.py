"""The evaluate page: a form that is a command, a job, and the results of all."""

import html
import json
import os
import re
import shlex

import pytest
from evaluation_folder import DIGEST, evaluated_row, judged, make_evaluation
from studio_place import make_run

from research.studio.jobs.job_queue import JobQueue

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def client(site, monkeypatch):
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    monkeypatch.chdir(site.runs.parent)
    for name in ("a", "b"):
        make_run(site.runs / name, "finished")
        (site.runs / name / "checkpoints" / "3").mkdir(parents=True)
    (site.data / "test.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    return site.client()


def sent(page):
    """The fields of the form, as a browser would send them."""
    form = page.partition('action="/flags/evaluate"')[2].partition("</form>")[0]
    fields = dict(re.findall(r'<input[^>]* name="([^"]+)" value="([^"]*)"', form))
    fields.pop("run", None)
    runs = re.findall(r'name="run" value="([^"]*)" checked', form)
    for name, text in re.findall(r'<textarea[^>]* name="([^"]+)"[^>]*>([^<]*)<', form):
        fields[name] = text
    for name, inner in re.findall(
        r'<select[^>]* name="([^"]+)">(.*?)</select>', form, re.S
    ):
        chosen = re.search(r'value="([^"]*)" selected', inner)
        fields[name] = chosen[1] if chosen else ""
    return {name: html.unescape(x) for name, x in fields.items()} | {"run": runs}


def flags_of(answer):
    return shlex.split(answer.next_request.url.params["flags"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--run=runs/a"],
        ["--run=runs/b", "--run=runs/a@3", "--against=runs/b"],
        ["--run=runs/a", "--data=data/test.jsonl", "--metrics=chrf,bleu", "--rows=5"],
        [
            *("--run=runs/a", "--step=3", "--max_new_tokens=9", "--temperature=0.5"),
            *("--stop=end", "--stop=a b", "--slots=2"),
            *("--config.data.columns.response=say it", "--config.data.bad_lines=skip"),
        ],
    ],
)
def test_a_pasted_command_fills_the_form_which_makes_the_same_command(client, flags):
    pasted = shlex.join([".venv/bin/python", "-m", "research.evaluate", *flags])
    answer = client.get("/flags/evaluate", params={"pasted": pasted})
    page = client.get(answer.next_request.url).text
    assert shlex.join(flags) in html.unescape(page).partition("<h2>Command")[2]
    again = flags_of(client.get("/flags/evaluate", params=sent(page)))
    assert sorted(again) == sorted(flags)


def test_a_start_queues_the_command_that_is_shown(site, client):
    flags = "--run=runs/a --run=runs/b --data=data/test.jsonl"
    page = client.get("/evaluate", params={"flags": flags}).text
    assert f"-m research.evaluate {flags}" in page
    for expected in (303, 400):  # The same one waits already.
        answer = client.post("/act/evaluate", data={"flags": flags})
        assert answer.status_code == expected
    other = client.post("/act/evaluate", data={"flags": "--run=runs/a --rows=1"})
    assert other.status_code == 303
    first, second = site.state.queue.read().waiting
    assert first.command[1:] == ("-m", "research.evaluate", *flags.split())
    assert first.name == "evaluate a, b on test.jsonl" and first.log != second.log
    page = client.get("/evaluate").text
    assert page.count('data-state="waiting"') == 2
    assert "<strong>evaluate a, b on test.jsonl</strong>" in page
    # An evaluation of a run is no training of it.
    assert "queued" not in client.get("/run/runs/a").text
    line = site.state.audit.read()[0]
    assert line["action"] == "evaluate" and line["command"].endswith("test.jsonl")


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--rows=1", "--run is missing"),
        ("--run=runs/absent", "is no folder of a run"),
        ("--run=../out", "outside of"),
        ("--run=/etc", "outside of"),
        ("--run=data/test.jsonl", "outside of"),
        ("--run=runs/evil.py --config.data.bad_lines=skip", "is no folder of a run"),
        ("--run=runs/out", "leads out"),
        ("--run=runs/a --against=/etc", "outside of"),
        ("--run=runs/a --data=/etc/passwd", "outside of"),
        ("--run=runs/a --data=data/test.jsonl,x=/etc/passwd", "outside of"),
        ("--run=runs/a --metrics=os:system", "is a program"),
        ("--run=runs/a --flagfile=/etc/passwd", "no flag of research.evaluate"),
        ("--run=runs/a --config=configs/finetune_dolly.py", "no flag of"),
        ("--run=runs/a --config.lora.rank=2", "cannot be set here"),
        ("--run=runs/a --rows=-1", "rows"),
        ("--run=runs/a rm", "no flag of"),
        ("--run=runs/a 'open", "no command"),
    ],
)
def test_what_would_be_refused_or_leads_out_is_said_and_not_queued(
    site, client, flags, said
):
    (site.runs / "evil.py").write_text("raise SystemExit('it was run')\n")
    (site.runs / "out").symlink_to("/etc")
    page = client.get("/evaluate", params={"flags": flags})
    assert page.status_code == 200
    assert said in page.text and "<h2>Command" not in page.text
    answer = client.post("/act/evaluate", data={"flags": flags})
    assert answer.status_code in (400, 403)
    assert not site.state.queue.read().waiting


def test_an_upload_is_chosen_beside_the_other_flags(client):
    fields = {"flags": "--run=runs/a --rows=2", "file": "data/test.jsonl"}
    page = client.get("/evaluate", params=fields).text
    assert "--run=runs/a --data=data/test.jsonl --rows=2" in page
    assert client.get("/evaluate", params=fields | {"file": "data/../x"}).is_success


def test_all_evaluations_are_listed_also_those_started_by_hand(site, client):
    make_evaluation(site.runs / "a", findings=[EVIL])
    bad = make_evaluation(site.runs / "b", "bad-step-3")
    (bad / "evaluation.json").write_text('{"step": 3}')
    (site.runs / "b/evaluations/out-step-3").symlink_to("/etc")
    linked = site.runs / "b/evaluations/link-step-3"
    linked.mkdir()
    (linked / "evaluation.json").symlink_to("/etc/passwd")
    page = client.get("/evaluate").text
    assert f'href="/evaluation/runs/a/evaluations/{DIGEST}"' in page
    assert "tuned against base, on 8 rows: better in loss" in page
    assert "evaluation.json cannot be used" in page and page.count("<tr>") == 3
    assert EVIL not in page and html.escape(EVIL) in page
    assert client.get("/evaluate?run=runs/b").text.count("<tr>") == 2


def test_results_begin_with_verdicts_and_show_the_rows_that_changed(site, client):
    answers = {"base": "good", "tuned": EVIL, "other": "not shown"}
    rows = [
        evaluated_row("r1", EVIL, answers, category=EVIL),
        evaluated_row("r2", "x" * 2000, answers),
        evaluated_row("r3", "not among them", answers),
    ]
    folder = make_evaluation(site.runs / "a", rows=rows, left_out=[EVIL])
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"row": "r1", "models": 3}\n{"row": "r2\n[]\n')
    page = client.get(f"/evaluation/runs/a/evaluations/{DIGEST}").text
    assert EVIL not in page and "not among them" not in page
    assert "not shown" not in page, "only the model and its baseline stand there"
    order = [
        "the perplexity of tuned falls", "tuned against base, on 8 rows",
        "-0.250 (-0.375 to -0.125)", "Worst regressions: tuned", "-0.750",
        html.escape(EVIL), "Best gains: tuned", "+0.500", "2,000 characters",
    ]  # fmt: skip
    places = [page.index(each) for each in order]
    assert places == sorted(places)
    assert re.findall(r"<h4>(\w+)</h4>", page) == ["base", "tuned", "Reference"] * 2


@pytest.mark.parametrize(
    "name, status",
    [
        ("runs/a/evaluations/absent", 404),
        ("runs/a/checkpoints/3", 404),
        ("runs/a/evaluations/%2e%2e/%2e%2e/b", 403),
        ("runs/a/evaluations/out", 403),
        ("runs/a/evaluations/rows-out", 403),
        ("runs/a/evaluations/kept", 404),
        ("elsewhere/x", 404),
    ],
)
def test_nothing_but_evaluations_below_the_roots_is_read(site, client, name, status):
    folder = make_evaluation(site.runs / "a", "rows-out")
    os.remove(folder / "rows.jsonl")
    (folder / "rows.jsonl").symlink_to("/etc/passwd")
    (folder.parent / "out").symlink_to("/etc")
    (folder.parent / "kept").mkdir()
    assert client.get(f"/evaluation/{name}").status_code == status


@pytest.mark.parametrize(
    "changes",
    [
        {"models": {"base": {"run": "a", "loss": 1.0, "tokens": 3, "by_group": {}}}},
        {"comparisons": {"tuned": {"loss": {"verdict": "better"}}}},
        {"comparisons": [1]},
        {"regressions": {"tuned": [1]}},
        {"findings": 3},
        {"metrics": {"chrf": []}},
        {"models": []},
    ],
)
def test_a_file_that_holds_something_else_is_said_in_a_sentence(site, client, changes):
    make_evaluation(site.runs / "a", **changes)
    answer = client.get(f"/evaluation/runs/a/evaluations/{DIGEST}")
    assert answer.status_code == 400
    assert "run the evaluation again" in html.unescape(answer.text)
    assert client.get("/evaluate").status_code == 200


def test_prompts_alone_have_no_losses_and_are_shown(site, client):
    models = {name: {"run": "a", "answers": {}} for name in ("base", "tuned")}
    one = {"tuned": {"empty": judged(0.5, 0.25, "better")}}
    make_evaluation(site.runs / "a", models=models, comparisons=one)
    page = client.get(f"/evaluation/runs/a/evaluations/{DIGEST}").text
    assert "better in empty (from 0.500 to 0.250)" in page and "Losses" not in page
    assert "cannot be used" not in client.get("/evaluate").text


def test_evaluations_of_earlier_versions_and_without_a_baseline_are_shown(site, client):
    folder = make_evaluation(site.runs / "a", baseline="")
    values = json.loads((folder / "evaluation.json").read_text())
    for later in ("findings", "unused", "overlap", "comparisons", "regressions"):
        del values[later]
    (folder / "evaluation.json").write_text(json.dumps(values))
    page = client.get(f"/evaluation/runs/a/evaluations/{DIGEST}")
    assert "no other model to compare with" in page.text
