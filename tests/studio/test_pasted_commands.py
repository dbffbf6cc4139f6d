"""A command that a page shows fills its form again when it is pasted."""

import html
import itertools
import json
import os
import random
import re
import shlex

import psutil
import pytest
from fake_upstream import list_server
from studio_place import make_run

from research.studio.checks.config_presets import FOLDER
from research.studio.jobs.pasted_words import DOORS

SERVED = {"name": "api", "slots": "4", "adapters": "", "port": "", "weights": "int8"}
PROMOTED = {"run": "tuned", "step": 3, "checkpoint": "", "by": "ann", "at": ""}
TRAIN, BEGUN = "python -m research.train", "--config.model.init_from=runs/tuned@3"
CASES = [
    ("deploy", {"do": "serve", "run": ["runs/tuned", "runs/prod"], **SERVED}),
    (
        "deploy",
        {"do": "export", "run": "runs/tuned", "step": "3", "format": "hf-float16"},
    ),
    ("deploy", {"do": "export", "run": "runs/tuned", "format": "hf-float32"}),
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


@pytest.mark.parametrize(
    "page, command, said",
    [
        ("deploy", "python -m research.serve --run=/etc", "outside of"),
        ("deploy", "python -m research.serve --run=runs/a --host=0.0.0.0", "shell"),
        ("deploy", "rm -rf /", "paste a command of research.serve"),
        ("deploy", "python -m research.serve 'open", "no command"),
        ("chat", "python -m research.serve --run=runs/tuned --slots=2", "use Deploy"),
        ("branch", "python -m research.train --config=runs/tuned", "RUN@STEP"),
        ("branch", "python -m research.train runs/tuned", "no knob"),
        ("branch", f"{TRAIN} --config=configs/a.py {BEGUN}", "use Train"),
        ("data", f"{TRAIN} --config={FOLDER}/pretrain_tiny.py", "on the Train page"),
        ("data", "python -m research.train --config=/etc/evil.py", "a run below"),
        ("data", "python -m research.train --config.data.path=/etc/x", "outside of"),
        ("data", "python -m research.evaluate --run=x", "place on the Evaluate page"),
        ("train", "python -m research.runs --run=x stop", "the page of its run"),
        ("train", "kill -TERM 7", "paste a command of research.train"),
        ("train", "python -m launch slurm --config.steps=7", "behind --"),
        ("train", "python -m launch local -- --config.steps=7 > log", "'>' is no knob"),
        (
            "deploy",
            "python -m research.runs.aliases --alias=runs/prod --back &",
            "no value",
        ),
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
        ("train", "launch local --restarts 7 -- --config.steps=7", ["--restarts=7"]),
        (
            "train",
            "research.plan --search --json=/plan.json --device=l4 --config.steps=7",
            ["--search", "--json=/plan.json"],
        ),
        (
            "train",
            "research.studio.checks --into /x --rows_only --config.steps=7",
            ["--into=/x", "--rows_only"],
        ),
        (
            "data",
            "launch slurm --gpus-per-node=8 -- --config.data.path=embedded",
            ["launch slurm", "--gpus-per-node=8"],
        ),
        (
            "data",
            "research.studio.checks --first=7 --config.data.path=embedded",
            ["--first=7"],
        ),
        ("branch", f"launch gke --x=1 -- {BEGUN}", ["launch gke", "--x=1"]),
        (
            "sweeps",
            "launch.sweep --sweep=configs/sweeps/lora_rank.py --axis lora.rank=4",
            ["--axis=lora.rank=4"],
        ),
        ("deploy", "research.export --run=runs/tuned --step=3 --dtype=float16", []),
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
    said = f"this form has no place for {', '.join(dropped)}: the command"
    assert (said in again) == bool(dropped)
    assert ("no place" in again) == bool(dropped)


def test_a_switch_without_a_value_stays_on_in_a_branch(client):
    switches = "--config.text.isolate --noconfig.export"
    pasted = f"{TRAIN} --config=runs/tuned {BEGUN} --config.run_dir=runs/new {switches}"
    answer = client.get("/flags/branch", params={"pasted": pasted})
    page = html.unescape(client.get(answer.next_request.url).text)
    assert "--config.text.isolate=True --config.export=False" in page


# -- every command of every page, as it is and changed -------------------------------

JOB = {
    "id": "1", "name": "a job", "place": "runs/tuned", "log_file": "log",
    "folder": "/", "added": "2026-11-27T10:00:00+00:00",
}  # fmt: skip
FLAGS = f"--config={FOLDER}/finetune_dolly.py --config.steps=7"
SHOWN = (
    ("train", {"flags": FLAGS}),
    ("plans", {"flags": FLAGS, "devices": "here\nh100:8 2.5"}),
    (
        "evaluate",
        {"flags": "--run=runs/tuned --metrics=chrf --config.data.columns.response=say"},
    ),
    ("evaluate", {"flags": "--run=runs/tuned --run=runs/tuned@3 --rows=5 --stop=a"}),
    ("sweeps", {"flags": f"--axis=lora.rank=4,8 --seeds=1,2 -- {FLAGS}"}),
    ("sweeps", {"flags": f"--sweep={FOLDER}/sweeps/lora_rank.py -- --config.steps=7"}),
    ("sweep/runs/sweep", {}),
    *((f"run/runs/{name}", {}) for name in ("tuned", "trains")),
    *((f"deploy/{name}", {}) for name in ("api", "ended")),
    *(("queue", {}), ("chat", {"server": "ended"}), ("", {})),
    *CASES,
)
FORMS = ("train", "data", "branch", "evaluate", "sweeps", "chat", "deploy")
# Words that people write before a command, and into it.
BEFORE = ("CUDA_VISIBLE_DEVICES=1", "nohup", "nice -n 15", "JAX_PLATFORMS=cpu srun")
MORE = (
    "--config.steps 9", "--noconfig.export", "--search", "--host=0.0.0.0", "> log",
    "--port=99", "--restarts=7", "--gpus-per-node 8", "--out=/elsewhere", "&",
    "--slots=3", "--seeds=4,5", "--config=runs/tuned", "--rows=3", "--unknown=1",
    "--config.seed=5", "--step=best", "--into=/x", "--first=3", "--quant=q8_0",
    "--format=hf", "--device=4090", "--dry-run", "-- --config.steps=3", "word",
)  # fmt: skip


@pytest.fixture
def busy(site, client):
    """Runs, a sweep, jobs and servers, so that pages show commands of each kind."""
    make_run(site.runs / "trains", "killed")
    run = make_run(site.runs / "sweep" / "a")
    sweep = {"question": "?", "metric": "loss", "axes": [{"name": "lora.rank"}]}
    sweep["runs"] = [{"name": "a", "point": ["4"], "seed": 0}]
    (run.parent / "sweep.json").write_text(json.dumps(sweep))
    here = {"pid": os.getpid(), "born": psutil.Process().create_time()}
    command = shown(client.get("/train", params={"flags": FLAGS}).text, "launch local")
    jobs = {"waiting": [], "ended": []}
    jobs["running"] = [JOB | here | {"command": shlex.split(command)}]
    site.state.queue.folder.mkdir(parents=True, exist_ok=True)
    (site.state.queue.folder / "jobs.json").write_text(json.dumps(jobs))
    served = client.get("/deploy", params=CASES[0][1]).text
    words = shlex.split(shown(served, "research.serve"))
    for name, born in (("api", here["born"]), ("ended", 1.0)):
        facts = here | {"born": born, "command": words, "port": 9}
        list_server(site.runs / ".studio" / "servers", name, **facts)
    return client


def commands_of(text):
    """All commands of a page."""
    return [html.unescape(x) for x in re.findall(r'<pre tabindex="0">([^<]*)<', text)]


def all_commands(client):
    pages = [client.get(f"/{page}", params=fields).text for page, fields in SHOWN]
    found = [x for text in pages for x in commands_of(text)]
    return list(dict.fromkeys(found))


def parts(command):
    """Its words, and what stands around the first `=` of each."""
    try:
        words = shlex.split(command.replace("\\\n", " "))
    except ValueError:  # A program.
        return set(command.split())
    found = {part for word in words for part in word.split("=", 1)}
    python = {x for x in found if "python" in x}
    return found - python - {*DOORS, "local", "-m", "--", ""}


def is_said(part, text):
    return re.search(rf"(^|[\s=]){re.escape(part)}($|[\s=,:])", text) is not None


NEW_FOLDER = "--config.run_dir=runs/finetune_dolly"  # Train chooses it by itself.


def require_told(client, form, command):
    """The form has all parts of the command, or a sentence says which it has not."""
    answer = client.get(f"/flags/{form}", params={"pasted": command})
    if answer.status_code in (400, 403, 404):
        main = re.sub("<[^>]*>", " ", answer.text.partition("<main")[2])
        assert len(html.unescape(main).split()) > 5, (form, command)
        return "refused"
    assert answer.status_code == 303, (form, command, answer.text)
    page = client.get(answer.next_request.url).text
    assert page.startswith("<!doctype html>")
    said = html.unescape(
        " ".join(re.findall(r'class="(?:said|problem)"[^>]*>([^<]*)<', page))
    )
    for part in re.findall(r'data-part="(/plans[^"]*)"', page):
        page += client.get(html.unescape(part)).text
    wanted = parts(command) - (parts(NEW_FOLDER) if form == "data" else set())
    left = [
        [x for x in wanted - parts(made) if not is_said(x, said)]
        for made in commands_of(page)
    ]
    has_problem = 'class="problem"' in page
    assert has_problem or [] in left, (form, command, said, min(left, key=len))
    return "shown" if command in commands_of(page) and not said else "told"


def home(command):
    """The forms that make such a command."""
    doors = {
        "launch.sweep": ["sweeps"],
        "research.evaluate": ["evaluate"],
        "research.export": ["deploy"],
        "research.runs.aliases": ["deploy"],
        "research.serve": ["deploy", "chat"],
        "research.studio.checks": ["data" if "--rows_only" in command else "train"],
        **{x: ["train"] for x in ("launch", "research.train", "research.plan")},
    }
    found = [x for x in shlex.split(command.replace("\\\n", " ")) if x in doors]
    return doors[found[0]] if found else []


def test_a_command_that_is_shown_fills_the_form_that_shows_it(busy):
    others = re.compile("launch (?:tpu-vm|gke|skypilot)")  # As slurm.
    found = [x for x in all_commands(busy) if home(x) and not others.search(x)]
    doors = {word for x in found for word in shlex.split(x) if word in DOORS}
    assert doors == {*DOORS} - {"research.train", "research.runs", "launch.report"}
    assert len(found) > 25
    ends = {
        command: {require_told(busy, form, command) for form in home(command)}
        for command in found
    }
    assert {x: end for x, end in ends.items() if "shown" not in end} == {}


@pytest.mark.soak
def test_no_form_loses_a_part_of_any_command_in_silence(busy):
    rng = random.Random(7)
    found = all_commands(busy)
    results = [
        require_told(busy, form, x) for form, x in itertools.product(FORMS, found)
    ]
    assert {*results} == {"refused", "shown", "told"}
    for _ in range(400):
        command, form = rng.choice(found), rng.choice(FORMS)
        words = command.split(" ")
        for more in rng.sample(MORE, rng.choice((1, 1, 2, 3))):
            at = rng.randrange(3, len(words) + 1) if len(words) > 3 else len(words)
            words.insert(at, more)
        if rng.random() < 0.3:
            words.insert(0, rng.choice(BEFORE))
        forms = home(command) or [form]
        require_told(busy, rng.choice([form, *forms]), " ".join(words))
