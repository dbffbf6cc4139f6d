"""The plan of a start: chips here and elsewhere, and dry runs of each target."""

import html
import json
import shlex
import sys

import pytest
from waiting import wait_until

from launch import targets
from research.core.errors import UserError
from research.studio.checks import start_plans
from research.studio.checks.page_process import PageProcesses
from research.studio.checks.start_plans import TARGETS, PricedDevices

FLAGS = "--config=configs/finetune_dolly.py --config.run_dir=runs/new"


@pytest.fixture
def client(site, monkeypatch):
    """Its commands are written down, and not started."""
    site.started = []

    def start(self, folder, command, env=None):
        site.started.append(command)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "process.json").write_text('{"pid": 1, "born": 0.5}')
        (folder / "output").write_text("# file <b>run.sh</b>\n")
        (folder / "log").write_text("launch: a warning\n")

    monkeypatch.setattr(PageProcesses, "start", start)
    site.flags = f"{FLAGS}".replace("runs/new", str(site.runs / "new"))
    return site.client()


def plan_of(chips, hours, **more):
    use = {"seconds": 2.0, "tokens_per_second": 500.0, "days": 0.25}
    best, worst = use | {"chip_hours": hours}, use | {"chip_hours": 2 * hours}
    plan = {"target": chips, "fits": True, "hbm_needed": 2**30, "hbm_usable": 2**33}
    plan |= {"steps": 60, "advice": "", "notes": ["a <b>note</b>"]}
    return plan | {"best": best, "not_overlapped": worst} | more


def test_all_targets_that_are_not_this_machine_are_shown():
    assert TARGETS.keys() == {*targets.names()} - {"local"}


def test_a_plan_is_a_process_with_the_command_that_is_shown(site, client):
    devices = "here\nh100:8 2.5"
    page = html.unescape(client.get("/plans", params={"flags": site.flags}).text)
    assert "--device=here,l4,h100,v5e:1x1" in page and not site.started
    form = {"flags": site.flags, "devices": devices, "start": "plan"}
    answer = client.post("/act/plan", data=form)
    (command,) = site.started
    assert shlex.join(command[1:]).startswith("-m research.plan --device=here,h100:8 ")
    assert shlex.join(command).endswith(site.flags)
    shown = answer.next_request.url
    assert shlex.join(command) in html.unescape(client.get(shown).text)
    file = command[4].partition("=")[2]
    with open(file, "w") as written:
        refused = {"target": "<b>h100</b>", "problem": "no <b>mesh</b>"}
        json.dump([plan_of("cpu:1", 4.0), refused], written)
    page = client.get(shown).text
    assert (
        "<b>" not in page and "no &lt;b&gt;mesh" in page and "a &lt;b&gt;note" in page
    )
    assert "4.00-8.00" in page and ">cost<" in page
    with open(file, "w") as written:
        json.dump([plan_of("cpu:1", 4.0), plan_of("h100:8", 4.0)], written)
    assert "10.00-20.00" in client.get(shown).text
    with open(file, "w") as written:
        json.dump([{"target": 1}], written)
    assert "plan again" in client.get(shown).text


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_shows_files_and_commands(site, client, target):
    field, own = f"launch.{target}", "--restarts=2"
    form = {"flags": site.flags, field: own, "start": target}
    answer = client.post("/act/plan", data=form)
    (command,) = site.started
    assert command[1:6] == ["-m", "launch", target, "--dry-run", own]
    assert shlex.join(command).endswith(f" -- {site.flags}")
    page = client.get(answer.next_request.url).text
    assert "# file &lt;b&gt;run.sh" in page and "launch: a warning" in page
    shown = html.unescape(page)
    assert f"launch {target} {own} -- {site.flags}" in shown


@pytest.mark.parametrize(
    "form, said",
    [
        ({"start": "plan", "devices": "h100; rm"}, "is no kind of chip"),
        ({"start": "plan", "devices": "h100 much"}, "is no kind of chip"),
        ({"start": "plan", "devices": "h100 -1"}, "is no kind of chip"),
        ({"start": "plan", "devices": "--json=x"}, "is no kind of chip"),
        ({"start": "plan", "devices": "l4\n" * 13}, "name 1 to 12"),
        ({"start": "slurm", "launch.slurm": "-- --config=evil.py"}, "is no flag"),
        ({"start": "slurm", "launch.slurm": "evil"}, "is no flag"),
        ({"start": "slurm", "launch.slurm": "'"}, "No closing quotation"),
        ({"start": "local"}, "is none of slurm"),
        ({"start": "plan", "flags": "--config=/tmp/evil.py"}, "start any other"),
        ({"start": "plan", "flags": "--config.run_dir=/etc/x"}, "outside of"),
    ],
)
def test_nothing_starts_for_a_form_that_makes_no_sense(site, client, form, said):
    form = {"flags": site.flags} | form
    answer = client.post("/act/plan", data=form)
    assert answer.status_code in (400, 403) and said in html.unescape(answer.text)
    assert not site.started
    assert client.get("/plans", params=form).status_code == 200


def test_prices_stand_behind_kinds_of_chips():
    found = PricedDevices.from_text(" here \n\nv5e:2x4 1.2\n24GB 0\n")
    assert found.names == ("here", "v5e:2x4", "24GB")
    assert found.prices == (None, 1.2, 0.0)
    with pytest.raises(UserError, match="name 1 to 12"):
        PricedDevices.from_text("\n")
    assert PricedDevices.from_text(start_plans.DEVICES).prices == (None,) * 4


def test_a_process_of_a_page_is_found_again_and_ended_by_the_next(tmp_path):
    processes = PageProcesses(tmp_path)
    slow, quick = processes.place("slow"), processes.place(["quick", 1])
    assert processes.look(slow).state == "absent"
    processes.start(slow, ["python", "-c", "import time; time.sleep(600)"])
    assert PageProcesses(tmp_path).look(slow).state == "running"
    program = "import sys; print('said'); sys.exit('error: no <b>')"
    processes.start(quick, ["python", "-c", program])
    assert processes.look(slow).problem == "it was ended by another one"
    wait_until(lambda: processes.look(quick).state != "running")
    found = processes.look(quick)
    assert found.output == "said\n" and found.problem == "no <b>"
    assert sys.executable and PageProcesses(tmp_path).look(quick) == found
