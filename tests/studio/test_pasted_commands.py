"""A command that a page shows fills its form again when it is pasted."""

import html
import json
import re

import pytest
from studio_place import make_run

from research.studio.checks.config_presets import FOLDER

SERVED = {"name": "api", "slots": "4", "adapters": "", "port": "", "weights": "int8"}
PROMOTED = {"run": "tuned", "step": 3, "checkpoint": "", "by": "ann", "at": ""}
TRAIN, BEGUN = "python -m research.train", "--config.model.init_from=runs/tuned@3"
CASES = [
    ("deploy", {"do": "serve", "run": ["runs/tuned", "runs/prod"], **SERVED}),
    ("deploy", {"do": "export", "run": "runs/tuned", "step": "3", "format": "float16"}),
    ("deploy", {"do": "export", "run": "runs/tuned", "format": "float32"}),
    ("deploy", {"do": "promote", "run": "runs/tuned", "step": "3", "alias": "new"}),
    ("deploy", {"do": "back", "alias": "runs/prod"}),
    ("chat", {"run": ["runs/tuned", "runs/tuned@3"]}),
    ("chat", {"run": [""]}),
    (
        "branch",
        {
            "run": "runs/tuned",
            "step": "3",
            "target": "new",
            "changes": "--config.seed=7",
        },
    ),
    ("data", {"file": "data/rows.jsonl", "instruction": "ask", "skip": "yes"}),
    ("data", {"file": "embedded"}),
    ("data", {"hub": "owner/name"}),
    ("data", {"hub": "owner/name", "instruction": "ask", "skip": "yes"}),
    ("data", {"file": "embedded", "at": "200"}),
    ("data", {"file": "data/notes.md"}),
]


@pytest.fixture
def client(site, monkeypatch):
    monkeypatch.chdir(site.runs.parent)
    run = make_run(site.runs / "tuned")
    (run / "identity.json").write_text('{"base model": "x"}')
    (run / "checkpoints" / "3").mkdir(parents=True)
    (site.runs / "prod").mkdir()
    alias = {"promotions": [PROMOTED, PROMOTED]}
    (site.runs / "prod" / "alias.json").write_text(json.dumps(alias))
    (site.data / "rows.jsonl").write_text('{"ask": "a", "response": "b"}\n')
    (site.data / "notes.md").write_text("# Notes\n")
    return site.client()


def shown(page, text=r"-m (?:research|launch)"):
    """The last command of a page."""
    found = re.findall(rf'<pre tabindex="0">([^<]*{text}[^<]*)</pre>', page)
    return html.unescape(found[-1])


@pytest.mark.parametrize("page, fields", CASES)
def test_a_command_that_is_shown_fills_the_form_that_shows_it(client, page, fields):
    command = shown(client.get(f"/{page}", params=fields).text)
    answer = client.get(f"/flags/{page}", params={"pasted": command})
    assert answer.status_code == 303, html.unescape(answer.text)
    again = client.get(answer.next_request.url).text
    assert shown(again) == command
    assert 'name="pasted"' in again and "no place" not in again


@pytest.mark.parametrize(
    "page, command, said",
    [
        ("deploy", "python -m research.serve --run=/etc", "outside of"),
        ("deploy", "python -m research.serve --run=runs/a --host=0.0.0.0", "shell"),
        ("deploy", "rm -rf /", "paste a command of research.serve"),
        ("deploy", "python -m research.serve 'open", "no command"),
        ("chat", "python -m research.serve --run=runs/tuned --slots=2", "use Deploy"),
        ("branch", "python -m research.train --config=runs/tuned", "RUN@STEP"),
        ("branch", "python -m research.train runs/tuned", "no flag"),
        ("branch", f"{TRAIN} --config=configs/a.py {BEGUN}", "use Train"),
        ("data", f"{TRAIN} --config={FOLDER}/pretrain_tiny.py", "on the Train page"),
        ("data", "python -m research.train --config=/etc/evil.py", "a run below"),
        ("data", "python -m research.train --config.data.path=/etc/x", "outside of"),
        ("data", "python -m research.evaluate --run=runs/tuned", "no knob"),
    ],
)
def test_a_command_that_no_form_has_is_refused_with_the_reason(
    client, page, command, said
):
    answer = client.get(f"/flags/{page}", params={"pasted": command})
    assert answer.status_code in (400, 403) and said in html.unescape(answer.text)


SOURCES = "--config.text.sources=('x=data/notes.md','y=data')"


@pytest.mark.parametrize(
    "page, command, dropped",
    [
        ("deploy", "research.export --run=runs/tuned --out=/else", ["--out=/else"]),
        ("deploy", "research.export --run=runs/none --out=/else", ["--out=/else"]),
        (
            "deploy",
            "research.serve --run=runs/tuned --api_key_file=/k/api/keys "
            "--adapters_from=/k",
            ["--api_key_file=/k/api/keys", "--adapters_from=/k"],
        ),
        ("chat", "research.serve --run=runs/tuned --port=9", ["--port=9"]),
        (
            "data",
            f"research.train --config={FOLDER}/finetune_dolly.py "
            "--config.data.seq_len 64 --config.data.path=data/rows.jsonl "
            "--config.data.columns.system=who",
            ["--config.data.seq_len 64"],
        ),
        (
            "data",
            f'research.train --config={FOLDER}/pretrain_tiny.py "{SOURCES}"',
            [SOURCES],
        ),
        (
            "data",
            "research.train --config=runs/tuned --config.data.path=embedded",
            ["--config=runs/tuned"],
        ),
    ],
)
def test_flags_that_a_form_has_no_place_for_are_named(client, page, command, dropped):
    answer = client.get(f"/flags/{page}", params={"pasted": f"python -m {command}"})
    assert answer.status_code == 303, html.unescape(answer.text)
    again = html.unescape(client.get(answer.next_request.url).text)
    assert f"this form has no place for {', '.join(dropped)}: the command" in again


def test_a_switch_without_a_value_stays_on_in_a_branch(client):
    switches = "--config.text.isolate --noconfig.export"
    pasted = f"{TRAIN} --config=runs/tuned {BEGUN} --config.run_dir=runs/new {switches}"
    answer = client.get("/flags/branch", params={"pasted": pasted})
    page = html.unescape(client.get(answer.next_request.url).text)
    assert "--config.text.isolate=True --config.export=False" in page
