"""The sweeps page: a form that is a command, and the report and runs of each sweep."""

import html
import json
import re
import shlex

import pytest
from studio_place import eval_line, make_run, train_line

from launch.report import sweep_results, sweep_values
from launch.sweep.__main__ import parse as parse_sweep
from research.studio.checks.page_process import PageProcesses
from research.studio.jobs.job_queue import JobQueue
from research.studio.sweeps import sweep_flags

EVIL = "<script>alert(1)</script>"
AXES = "--axis=lora.rank=4,16 --axis=optim.learning_rate=1e-4,5e-4"
VALUES = "-- --config=configs/finetune_dolly.py --config.steps=4"


@pytest.fixture
def client(site, monkeypatch):
    """Jobs and reports are written down, and not started."""
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    site.started = []

    def start(self, folder, command):
        site.started.append(command)

    monkeypatch.setattr(PageProcesses, "start", start)
    return site.client()


def sent(page):
    """The fields of the form, as a browser would send them."""
    form = page.partition('action="/flags/sweeps"')[2].partition("</form>")[0]
    fields = dict(re.findall(r'<input[^>]* name="([^"]+)" value="([^"]*)"', form))
    fields |= re.findall(r'<textarea[^>]* name="([^"]+)"[^>]*>([^<]*)<', form)
    for name, inner in re.findall(
        r'<select[^>]* name="([^"]+)">(.*?)</select>', form, re.S
    ):
        chosen = re.search(r'value="([^"]*)" selected', inner)
        fields[name] = chosen[1] if chosen else ""
    return {name: html.unescape(text) for name, text in fields.items()}


def make_sweep(folder, question="Which rank?", names=("4", "16"), **more):
    """Two seeds of two ranks; the last run has not begun."""
    runs = [(label, seed) for label in names for seed in (0, 1)]
    listed = [
        {"name": f"rank-{i}", "point": [label], "seed": seed, "steps": 3}
        | {"command": ["python", "-m", "research.train"]}
        for i, (label, seed) in enumerate(runs)
    ]
    points = {label: {"lora.rank": 4 + i} for i, label in enumerate(names)}
    sweep = {"metric": "loss", "question": question, "file": "s.py", "shared": []}
    sweep |= {"axes": [{"name": "lora.rank", "points": points}]}
    sweep |= {"baseline": [names[0]], "runs": listed} | more
    for i, run in enumerate(listed[:-1]):
        lines = [eval_line(0, 3.0), train_line(3), eval_line(3, 2.0 - i / 8)]
        made = make_run(folder / run["name"], "finished", lines)
        assert made.is_dir()
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        f"{AXES} --seeds=0,1 --metric=loss/open_qa {VALUES}",
        "--sweep=configs/sweeps/lora_rank.py --together=2 -- --config.steps=9",
        "--sweep=configs/sweeps/lora_rank.py --seeds=3",
    ],
)
def test_a_pasted_command_fills_the_form_which_makes_the_same(site, client, flags):
    pasted = f"python -m launch.sweep {flags}"
    answer = client.get("/flags/sweeps", params={"pasted": pasted})
    page = client.get(answer.next_request.url).text
    again = client.get("/flags/sweeps", params=sent(page))
    made = shlex.split(again.next_request.url.params["flags"])
    folder = [word for word in made if word.startswith("--folder=")]
    assert len(folder) == 1 and str(site.runs / "sweeps") in folder[0]
    made.remove(folder[0])
    assert sorted(made) == sorted(shlex.split(flags))
    own = made[: made.index("--")] if "--" in made else made
    parse_sweep([*own, *folder])  # The command takes these flags.


def test_a_start_queues_the_sweep_and_its_folder_is_never_taken_twice(site, client):
    flags = f"{AXES} {VALUES}"
    for status in (303, 400):
        answer = client.post("/act/sweep", data={"flags": flags})
        assert answer.status_code == status
    (job,) = site.state.queue.read().waiting
    assert job.command[1:3] == ("-m", "launch.sweep")
    assert job.target == site.runs / "sweeps" / "lora.rank_optim.learning_rate"
    assert job.log.name == "lora.rank_optim.learning_rate.log"
    page = client.get("/sweeps").text
    assert "sweep lora.rank_optim.learning_rate" in page
    job.target.mkdir(parents=True)
    page = html.unescape(client.get("/sweeps", params={"flags": flags}).text)
    assert "lora.rank_optim.learning_rate-2 --" in page


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--seeds=1", "choose a sweep file, or write an axis"),
        ("--sweep=/tmp/evil.py", "a sweep file is a program"),
        ("--sweep=configs/sweeps/small.py", "a sweep file is a program"),
        (f"{AXES} -- --config=/tmp/evil.py", "the studio takes a file of"),
        (AXES, "the studio takes a file of"),
        (f"--axis=lora.rnak=1,2 {VALUES}", "lora.rank"),
        (f"{AXES} {VALUES} --config.lora.rnak=1", "lora.rank"),
        (f"{AXES} --target=slurm {VALUES}", "start other sweeps in a shell"),
        (f"{AXES} --settings=x {VALUES}", "start other sweeps in a shell"),
        (f"{AXES} --seeds=a {VALUES}", "is not as --help has it"),
        (f"{AXES} --together=0 {VALUES}", "is not as --help has it"),
        (f"{AXES} --folder=/etc {VALUES}", "outside of"),
        (f"{AXES} --folder=RUNS/a {VALUES}", "is a run"),
        (f"{AXES} --folder=RUNS/../x {VALUES}", "outside of"),
        (f"{AXES} {VALUES} --config.data.path=/etc/passwd", "outside of"),
        (f"--axis=data.eval_path=/etc/a,/etc/b {VALUES}", "outside of"),
        (f"{AXES} {VALUES} evil", "after --"),
        (f"{AXES} 'open", "no command"),
    ],
)
def test_what_would_be_refused_or_leads_out_is_said_and_not_queued(
    site, client, flags, said
):
    make_run(site.runs / "a")
    flags = flags.replace("RUNS", str(site.runs))
    page = client.get("/sweeps", params={"flags": flags})
    assert page.status_code == 200
    assert said in html.unescape(page.text) and "<h2>Command" not in page.text
    answer = client.post("/act/sweep", data={"flags": flags})
    assert answer.status_code in (400, 403)
    assert not site.state.queue.read().waiting


def test_a_sweep_shows_its_runs_before_and_its_best_run_after_the_first_report(
    site, client
):
    folder = make_sweep(site.runs / "sweeps" / "ranks", EVIL, ("4", EVIL))
    assert 'href="/sweep/runs/sweeps/ranks"' in client.get("/sweeps").text
    page = client.get("/sweep/runs/sweeps/ranks").text
    assert EVIL not in page and html.escape(EVIL) in page
    assert "There is no report yet" in page
    assert page.count("not begun") == 1 and 'data-state="ended"' in page
    assert 'href="/run/runs/sweeps/ranks/rank-2"' in page
    sweep_values.write(sweep_results.load(folder))
    page = client.get("/sweep/runs/sweeps/ranks").text
    assert EVIL not in page
    best = page.index("has the lowest mean loss: 1.9375 over 2 seeds")
    assert best < page.index("1 of 2 runs not done") < page.index("<h2>Runs")
    assert "Done: 3 of 4 runs." in page
    (folder / "report.json").write_text('{"best": 3}')
    page = client.get("/sweep/runs/sweeps/ranks").text
    assert "make the report again" in page and "<h2>Runs" in page


def test_the_report_is_made_by_the_command_that_is_shown(site, client):
    folder = make_sweep(site.runs / "ranks")
    page = client.get("/sweep/runs/ranks").text
    answer = client.post("/act/sweep-report", data={"sweep": "runs/ranks"})
    assert answer.status_code == 303
    (command,) = site.started
    assert shlex.join(command) in html.unescape(page)
    assert command[1:] == ["-m", "launch.report", f"--sweep={folder}"]
    assert client.get("/sweep-report?sweep=runs/ranks").status_code == 404
    (folder / "report.html").write_text("<h1>plots</h1>")
    shown = client.get("/sweep-report?sweep=runs/ranks")
    assert "sandbox" in shown.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name, status",
    [("runs/absent", 404), ("runs/a", 404), ("runs/out", 403), ("x/y", 404)],
)
def test_nothing_but_sweeps_below_the_roots_is_read(site, client, name, status):
    make_run(site.runs / "a")
    outside = make_sweep(site.runs.parent / "outside")
    (site.runs / "out").symlink_to(outside)
    assert client.get(f"/sweep/{name}").status_code == status
    answer = client.post("/act/sweep-report", data={"sweep": name})
    assert answer.status_code == status and not site.started


@pytest.mark.parametrize("title", ["../a", "/etc", "..", "out"])
def test_a_sweep_that_names_strange_runs_reads_none_of_them(site, client, title):
    folder = make_sweep(site.runs / "ranks", names=("4", "16"))
    make_run(site.runs / "a")
    (folder / "out").symlink_to("/etc")
    sweep = json.loads((folder / "sweep.json").read_text())
    sweep["runs"][0]["name"] = title
    (folder / "sweep.json").write_text(json.dumps(sweep))
    page = client.get("/sweep/runs/ranks").text
    assert page.count("not begun") == 2 and f'href="/run/{title}' not in page


def test_the_files_of_sweeps_are_those_with_a_sweep():
    names = {name.rpartition("/")[2] for name in sweep_flags.sweep_files()}
    assert "lora_rank.py" in names and "small.py" not in names
