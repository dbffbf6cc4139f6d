"""A command that a page shows fills its form again when it is pasted."""

import html
import json
import re

import pytest
from studio_place import make_run

SERVED = {"name": "api", "slots": "4", "adapters": "", "port": "", "weights": "int8"}
PROMOTED = {"run": "tuned", "step": 3, "checkpoint": "", "by": "ann", "at": ""}
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
    assert 'name="pasted"' in again


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
