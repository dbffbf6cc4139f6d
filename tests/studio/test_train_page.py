"""The train page: flags and form are one thing, the doctor locks the start."""

import html
import re
import shlex

import pytest

from research.config.field_names import flag
from research.core.errors import UserError
from research.studio.checks.check_process import Check, Checks
from research.studio.checks.config_presets import presets
from research.studio.jobs.job_queue import JobQueue
from research.studio.pages import train_page
from research.tasks.findings import Finding

PRESET = "--config=configs/finetune_dolly.py"


@pytest.fixture
def client(site, monkeypatch):
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    return site.client()


def sent(page):
    """The fields of the form of knobs, as a browser would send them."""
    form = page.partition('action="/flags/train"')[2].partition("</form>")[0]
    fields = dict(re.findall(r'<input[^>]* name="([^"]+)" value="([^"]*)"', form))
    for name, inner in re.findall(
        r'<select[^>]* name="([^"]+)">(.*?)</select>', form, re.S
    ):
        fields[name] = re.search(r'value="([^"]*)" selected', inner)[1]
    return {name: html.unescape(text) for name, text in fields.items()}


def flags_of(answer):
    return shlex.split(answer.next_request.url.params["flags"])


def test_every_preset_fills_the_form_and_an_unchanged_form_keeps_it(client):
    assert len(presets()) >= 7
    for preset in presets():
        page = client.get("/train", params={"flags": f"--config={preset}"})
        assert page.status_code == 200
        flags = flags_of(client.get("/flags/train", params=sent(page.text)))
        assert [x for x in flags if "run_dir" not in x] == [f"--config={preset}"]


def test_a_changed_field_becomes_a_flag_and_is_marked(client):
    fields = sent(client.get("/train").text)
    fields |= {"knob.lora.rank": "4", "knob.eval.text_prompts": "('a b', '\"')"}
    answer = client.get("/flags/train", params=fields)
    flags = flags_of(answer)
    assert "--config.lora.rank=4" in flags
    assert "--config.eval.text_prompts=('a b', '\"')" in flags
    page = client.get(answer.next_request.url).text
    changed = re.findall(r'for="knob.([\w.]+)">[\w.]+ <span class="tag">changed', page)
    assert changed == ["run_dir", "lora.rank", "eval.text_prompts"]


@pytest.mark.parametrize(
    "before",
    [
        ".venv/bin/python -m launch local -- ",
        "JAX_PLATFORMS=cpu python -m research.train \\\n  ",
        "",
    ],
)
def test_a_pasted_command_fills_the_form(client, before):
    pasted = f"{before}{PRESET} --config.steps 7 --config.export"
    answer = client.get("/flags/train", params={"pasted": pasted})
    fields = sent(client.get(answer.next_request.url).text)
    assert (fields["knob.steps"], fields["knob.export"]) == ("7", "True")


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--config=/tmp/evil.py", "start any other config file in a shell"),
        ("--flagfile=/etc/passwd", "no knob of a training"),
        (f"{PRESET} --config.lora.rank=0", "greater than 0"),
        (f"{PRESET} --config.lora.rnak=1", "lora.rank"),
        (f"{PRESET} --config.run_dir=/tmp/elsewhere", "outside of"),
        (f"{PRESET} --config.data.path=/etc/passwd", "outside of"),
        (f"{PRESET} 'open", "no command"),
    ],
)
def test_what_the_trainer_would_refuse_is_said_and_not_started(client, flags, said):
    page = client.get("/train", params={"flags": flags})
    assert page.status_code == 200
    assert said in page.text and "<h2>Command" not in page.text
    for action in ("check", "train"):
        answer = client.post(f"/act/{action}", data={"flags": flags})
        assert answer.status_code in (400, 403)


def test_one_click_trains_on_the_embedded_sample(site, client):
    page = client.get("/train").text
    words = re.search(r'name="flags" value="([^"]+)"', page)[1]
    for number in ("", "-2"):
        assert f"finetune_dolly{number}" in words
        assert client.post("/act/train", data={"flags": words}).status_code == 303
        words = re.search(r'name="flags" value="([^"]+)"', client.get("/train").text)[1]
    first, second = site.state.queue.read().waiting
    assert (first.name, second.name) == ("runs/finetune_dolly", "runs/finetune_dolly-2")
    assert first.command[1:6] == ("-m", "launch", "local", "--", PRESET)
    assert "--config.data.path=embedded" in first.command


@pytest.mark.parametrize("is_red", [True, False])
def test_a_red_finding_locks_the_start(site, client, monkeypatch, is_red):
    finding = Finding("end token", "<b>never</b> trained", not is_red, "set a template")
    found = Check("ended", [finding])
    monkeypatch.setattr(Checks, "read", lambda *_, **__: found)
    page = client.get("/train").text
    assert ('class="main" disabled' in page) is is_red
    assert ("set a template" in page) is is_red and "&lt;b&gt;never" in page
    answer = client.post("/act/train", data={"flags": PRESET})
    assert answer.status_code == (400 if is_red else 303)
    assert len(site.state.queue.read().waiting) == (not is_red)


@pytest.mark.parametrize(
    "check, said",
    [
        (Check("interrupted", problem="something ended it"), ""),
        (Check("failed", problem="no such column"), "failed: no such column"),
    ],
)
def test_a_start_without_findings_is_not_forbidden_by_them(
    site, client, monkeypatch, check, said
):
    monkeypatch.setattr(Checks, "read", lambda *_, **__: check)
    page = client.get("/train", params={"flags": PRESET}).text
    assert check.problem in page and "doctor forbids" not in page
    answer = client.post("/act/train", data={"flags": PRESET})
    assert answer.status_code == (400 if said else 303)
    assert said in answer.text and "findings" not in answer.text
    assert len(site.state.queue.read().waiting) == (not said)


def test_the_folder_of_a_run_is_never_taken_twice(site):
    (site.runs / "finetune_dolly").mkdir()
    flags = train_page.complete([], site.state)
    assert flags == [PRESET, flag("run_dir", site.runs / "finetune_dolly-2")]
    with pytest.raises(UserError, match="paste a command"):
        train_page.read_flags("rm -rf /")


def test_knobs_that_act_in_the_job_come_first_and_the_others_say_what_they_need(client):
    def first(flags):
        page = client.get("/train", params={"flags": flags}).text
        return re.findall(r'id="knob\.([\w.]+)"', page.partition("All other knobs")[0])

    rows, text = first(PRESET), first("--config=configs/pretrain_tiny.py")
    assert "data.path" in rows and "lora.rank" in rows and "text.sources" not in rows
    assert "text.cut" in text and "model.preset" in text and "data.path" not in text
    assert "lora.rank" not in first(f"{PRESET} --config.trainable=full")
    page = html.unescape(client.get("/train", params={"flags": PRESET}).text)
    needed = "would need: config.data.kind is not 'instructions'"
    assert needed in page.partition('id="knob.text.overlap"')[2].partition("</div>")[0]
    # Flags that contradict each other still leave a form.
    assert "data.path" in first(f"{PRESET} --config.steps=5 --config.epochs=2")
