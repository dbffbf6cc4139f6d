"""The pages in a real browser: curves that follow a run, keyboard, accessibility."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import threading

import psutil
import pytest
from browser_tab import Tab
from browser_tab import browser as browser
from evaluation_folder import DIGEST, make_evaluation
from fake_upstream import (
    FakeUpstream,
    chunk,
    head,
    list_server,
    reply,
    said_by_models,
)
from served_studio import ServedStudio, append
from studio_place import (
    ENDS,
    StudioPlace,
    eval_line,
    make_run,
    make_survey,
    train_line,
)
from waiting import PATIENCE, wait_until

from research.core.atomic_files import write_whole
from research.studio.checks.check_process import Checks
from research.studio.jobs.job_queue import QueuedJob
from research.studio.live import run_feed

SWEEP = {
    "question": "Which?",
    "metric": "loss",
    "axes": [{"name": "lora.rank"}],
    "runs": [{"name": "first", "point": ["4"], "seed": 0}],
}


def write_sweep(run):
    """A sweep with one run, and its report."""
    (run.parent / "sweep.json").write_text(json.dumps(SWEEP))
    report = {"done": 0, "count": 1, "best": None, "origins": {}}
    report |= {"header": ["lora.rank", "loss, mean"], "rows": [["4", "-"]]}
    (run.parent / "report.json").write_text(json.dumps(report))


NAME = "sweep/first"
PROMOTED = {
    "run": "other", "step": 3, "checkpoint": "", "by": "ann",
    "at": "2026-11-27T10:00:00+00:00",
}  # fmt: skip
ALIAS = {"promotions": [PROMOTED, PROMOTED]}
LOOK = 2100  # milliseconds: pages that follow something look again by then


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(run_feed, "LOOK_EVERY", 0.05)
    site = StudioPlace(tmp_path)
    lines = [eval_line(0, 3.0, qa=3.5), *(train_line(n) for n in range(1, 80))]
    make_run(site.runs / NAME, "killed", lines)
    make_run(site.runs / "other", "finished")
    make_evaluation(site.runs / NAME)
    write_sweep(site.runs / NAME)
    (site.runs / NAME / "checkpoints" / "60").mkdir(parents=True)
    (site.runs / "other" / "checkpoints" / "3").mkdir(parents=True)
    (site.runs / "prod").mkdir()
    (site.runs / "prod" / "alias.json").write_text(json.dumps(ALIAS))
    servers = site.runs / ".studio" / "servers"
    keys = list_server(servers, "api", port=9, key_file="keys") / "keys"
    keys.write_text("admin the-key-of-the-studio\nthe-key-of-ann-00000 # ann\n")
    text = json.dumps({"port": 9, "key_file": str(keys)})
    keys.with_name("server.json").write_text(text)
    (site.data / "rows.jsonl").write_text('{"ask": "Is it?", "say": "It is."}\n')
    server = ServedStudio(site.app)
    yield site, server
    server.stop()


def test_a_page_follows_its_run_over_a_restart_of_the_server(browser, served):
    site, server = served
    tab = Tab(browser, server)
    page, run = tab.page, site.runs / NAME
    page.get_by_role("link", name=f"runs/{NAME}").click()
    page.get_by_text("live", exact=True).wait_for()
    assert "token" not in page.url
    assert page.locator(".chart canvas").count() == 6
    assert not page.get_by_role("heading", name="Samples").is_visible()
    sample = {"step": 80, "prompt": "Why <b>?", "text": "It is so."}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page.evaluate("Date.now = () => Number.MAX_SAFE_INTEGER")  # Files were just read.
    append(run, train_line(80, loss=0.125), eval_line(80, 0.75, qa=0.5))
    page.locator('[data-figure="loss"]', has_text="0.125").wait_for()
    panel = page.get_by_role("heading", name="Samples").locator("xpath=..")
    panel.get_by_text("It is so.").wait_for()
    assert panel.locator("pre").all_inner_texts() == ["Why <b>?", "It is so."]
    page.locator('[data-figure="held_out"]', has_text="0.75").wait_for()
    server.stop()
    append(run, train_line(81, loss=0.0625))
    again = ServedStudio(StudioPlace(site.runs.parent).app, server.port)
    try:
        page.locator('[data-figure="loss"]', has_text="0.0625").wait_for()
        page.get_by_label("Smoothing").select_option("25")
        page.get_by_label("Lay another run").select_option("runs/other")
        legend = page.locator('[data-chart="loss"] .u-legend', has_text="runs/other")
        legend.wait_for()
        shutil.rmtree(site.runs / "other")
        page.get_by_label("Smoothing").select_option("100")
        page.get_by_text("runs/other is no longer shown").wait_for()
        page.wait_for_function(
            "!document.querySelector('[data-chart=loss] .u-legend')"
            ".textContent.includes('runs/other')"
        )
        shutil.rmtree(run)
        page.get_by_text("this run was moved or removed").wait_for()
    finally:
        again.stop()
    # A browser logs each answer of 404, here that of the run which was laid over.
    assert [x for x in tab.faults if "(Not Found)" not in x] == []


def keep_charts(page):
    """Lets the scripts of a page keep their charts where `page.evaluate` finds them."""
    begin = "show(curves, choice) {"
    kept = "(window.charts ??= {})[this.place.closest('[data-chart]').dataset.chart]"

    def spy(route):
        try:
            answer = route.fetch()
        except Exception:  # A test that ends takes the server from a page that loads.
            route.abort()
            return
        assert begin in answer.text()
        text = answer.text().replace(begin, f"{begin} {kept} = this;")
        route.fulfill(response=answer, body=text)

    page.route("**/charts.js", spy)


def test_each_line_is_drawn_once_and_a_hidden_tab_holds_no_stream(
    browser, served, monkeypatch
):
    site, server = served
    tab, run = Tab(browser, server), site.runs / NAME
    page, feed = tab.page, site.app.state.studio.feed

    def show(is_hidden):
        script = "Object.defineProperty(document, 'hidden', "
        script += f"{{value: {json.dumps(is_hidden)}, configurable: true}});"
        page.evaluate(f"{script} document.dispatchEvent(new Event('visibilitychange'))")

    def require_once(last):
        loss = page.locator('[data-figure="loss"]', has_text=f"0.{last}5")
        loss.wait_for()
        steps = page.evaluate("charts.loss.curves[0].x")
        assert steps == [*range(1, last + 1)]

    keep_charts(page)
    tab.open(f"/run/runs/{NAME}")
    page.get_by_text("live", exact=True).wait_for()
    append(run, train_line(80, loss=0.805))
    require_once(80)
    show(is_hidden=True)
    wait_until(lambda: not feed._listeners)
    append(run, train_line(81, loss=0.815))
    show(is_hidden=False)
    require_once(81)
    # The curves are read before the stream looks at the file.
    waits, looks, find_marks = threading.Event(), threading.Event(), run_feed._marks

    def find_marks_late(folder):
        waits.set()
        assert looks.wait(PATIENCE)
        return find_marks(folder)

    monkeypatch.setattr(run_feed, "_marks", find_marks_late)
    assert waits.wait(PATIENCE)
    append(run, train_line(82, loss=0.825))
    for steps in ("5", "0"):
        with page.expect_response("**/api/curves*"):
            page.get_by_label("Smoothing").select_option(steps)
    looks.set()
    require_once(82)
    assert feed._listeners == 1
    require_two_tabs_agree(page, run)
    assert tab.faults == []


def require_two_tabs_agree(page, run):
    """Both follow the run, and both say so when it has ended."""
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_text("live", exact=True).wait_for()
    other.get_by_label("Notes").fill("half a sent")
    append(run, train_line(83, loss=0.835))
    for each in (page, other):
        each.locator('[data-figure="loss"]', has_text="0.835").wait_for()
    record = json.loads((run / "run.json").read_text())
    record["starts"][0] |= ENDS["stopped"]
    write_whole(run / "run.json", json.dumps(record))
    page.locator(".state", has_text="stopped").wait_for()
    page.get_by_role("button", name="Resume").wait_for()
    # Nothing is drawn anew under the hands of somebody who writes.
    other.get_by_text("stopped now: load this page again").wait_for()
    assert other.get_by_label("Notes").input_value() == "half a sent"
    other.close()


def test_compared_curves_have_a_table_and_outlive_a_run_that_is_removed(
    browser, served
):
    site, server = served
    tab = Tab(browser, server)
    page = tab.page
    keep_charts(page)
    tab.open(f"/compare?run=runs/{NAME}&run=runs/other")
    table = page.locator('[data-chart="loss"] details')
    table.locator("summary").press("Enter")
    table.locator("tbody tr").first.wait_for()
    heads = ["step", f"runs/{NAME}", "runs/other"]
    assert table.locator("th").all_inner_texts() == heads
    last = table.locator("tbody tr").last.locator("td")
    assert last.all_inner_texts() == ["79", "0.03797", "-"]
    page.get_by_label("logarithmic").check()
    page.locator('[data-chart="loss"] .u-legend', has_text="runs/other").wait_for()
    require_keys_hide_a_curve_and_choose_steps(page)
    assert tab.faults == []
    shutil.rmtree(site.runs / "other")
    page.get_by_label("Smoothing").select_option("25")
    page.locator("[data-problem]", has_text="runs/other").wait_for()
    assert table.locator("th").all_inner_texts() == heads[:2]


def require_keys_hide_a_curve_and_choose_steps(page):
    """All that a mouse does with a chart, and that the mouse still does it."""
    curve = page.locator('[data-chart="loss"]').get_by_role("button", name="runs/other")
    for key, is_shown in (("Enter", False), ("Space", True), ("Enter", False)):
        curve.press(key)
        assert page.evaluate("charts.loss.plot.series[2].show") is is_shown
        assert curve.get_attribute("aria-pressed") == str(is_shown).lower()
    # A chart that is built anew keeps what is hidden, and where the keyboard is.
    page.evaluate("charts.loss.shape = ''; charts.loss.draw()")
    assert page.evaluate("charts.loss.plot.series[2].show") is False
    assert curve.evaluate("x => x === document.activeElement")

    def require_steps(*steps):
        shown = "(({min, max}) => [min, max])(charts.loss.plot.scales.x)"
        wait_until(lambda: page.evaluate(shown) == [*steps])
        ends = page.evaluate("(x => [x.at(0), x.at(-1)])(charts.loss.curves[0].x)")
        assert ends == [max(steps[0] - 1, 1), min(steps[1] + 1, 79)]

    page.get_by_label("from step").fill("20")
    page.get_by_label("to step").fill("40")
    page.get_by_label("to step").press("Enter")
    require_steps(20, 40)
    page.get_by_label("to step").fill("10")
    page.get_by_label("to step").press("Enter")
    assert page.locator("input.step:invalid").count() == 1
    require_steps(20, 40)
    page.get_by_role("button", name="All steps").press("Enter")
    require_steps(1, 79)
    assert page.get_by_label("from step").evaluate("x => x === document.activeElement")
    over = page.locator('[data-chart="loss"] .u-over')
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"], box["y"] + 50, steps=3)
    page.mouse.up()
    require_steps(40, 79)
    assert page.get_by_label("from step").input_value() == "40"
    assert page.evaluate("charts.held_out.plot.scales.x.min") == 40
    over.dblclick()
    require_steps(1, 79)


def test_a_page_follows_a_job_that_begins_writes_and_ends(browser, served):
    site, server = served
    log = site.runs / "job.log"
    own = {"pid": os.getpid(), "born": psutil.Process().create_time(), "began": "2026"}
    queue = site.state.queue
    job = QueuedJob("1", ("x", "-m", "y"), "my job", "a", str(log), "/", "2026")
    with queue.changing() as jobs:
        jobs.waiting.append(job)
    tab = Tab(browser, server)
    tab.page.clock.install()
    tab.open("/queue")
    tab.page.get_by_text("1. my job").wait_for()
    log.write_text("3 of 8 answers\n")
    with queue.changing() as jobs:
        jobs.waiting, jobs.running = [], [dataclasses.replace(job, **own)]
    tab.page.clock.fast_forward(LOOK)
    bar = tab.page.get_by_label("Progress of my job")
    bar.wait_for()
    assert bar.get_attribute("value") == "3"
    log.write_text("4 of 8 answers <b>\n")
    tab.page.clock.fast_forward(LOOK)
    tab.page.locator("pre", has_text="4 of 8 answers <b>").wait_for()
    with queue.changing() as jobs:
        jobs.running, jobs.ended = [], [dataclasses.replace(job, exit_code=0)]
    tab.page.clock.fast_forward(LOOK)
    tab.page.locator(".state", has_text="done").wait_for()
    assert tab.faults == []


def test_a_command_is_copied_and_knobs_are_found(browser, served):
    may = ["clipboard-read", "clipboard-write"]
    tab = Tab(browser, served[1], permissions=may)
    page = tab.page
    tab.open("/train")
    command = page.locator(".command").nth(1)
    copy = command.get_by_role("button", name="Copy")
    copy.press("Enter")
    command.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == command.locator("pre").inner_text()
    assert "-m launch local -- --config=" in copied
    page.get_by_label("Search").fill("ALPHA pattern")
    shown = page.locator("[data-group] [data-knob]:visible label")
    assert shown.all_inner_texts() == ["lora.alpha_pattern"]
    page.get_by_label("Search").press("Enter")
    assert page.url.endswith("/train")
    page.get_by_label("Search").fill("no such knob")
    assert shown.count() == 0
    page.get_by_label("Search").fill("")
    assert page.locator("[data-group]:visible").count() > 8
    copy.wait_for()  # Not `Copied` any more.
    assert tab.faults == []


LOOKED_AT = ["--config=configs/finetune_dolly.py", "--config.data.path=embedded"]


def test_what_is_typed_stays_while_a_check_runs_and_ends(browser, served):
    checks = served[0].state.checks
    tab = Tab(browser, served[1])
    page = tab.page
    page.clock.install()
    tab.open("/train")
    sent = page.locator('form[action="/act/check"] [name=flags]').get_attribute("value")
    place = checks._place(shlex.split(sent), False, 0)
    place.mkdir(parents=True)
    own = {"pid": os.getpid(), "born": psutil.Process().create_time()}
    (place / "process.json").write_text(json.dumps(own))
    page.reload()
    page.get_by_text("A process reads it now").wait_for()
    page.get_by_label("steps", exact=True).fill("123")
    page.locator("#check summary").press("Enter")
    finding = {"name": "rows", "text": "none", "ok": False, "remedy": "give some"}
    # Whole at once, as all that the server reads meanwhile.
    write_whole(place / "doctor.json", json.dumps({"findings": [finding]}))
    write_whole(place / "process.json", '{"pid": 99999999, "born": 1.0}')
    page.clock.fast_forward(LOOK)
    page.get_by_text("The doctor forbids this start.").wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()
    assert page.get_by_label("steps", exact=True).input_value() == "123"
    assert page.locator("#check details[open]").count() == 1
    assert page.evaluate("document.activeElement.id") == "check"
    assert tab.faults == []


def test_arrows_choose_columns_and_each_choice_looks_again(
    browser, served, monkeypatch
):
    site, server = served
    started = []
    monkeypatch.setattr(
        Checks, "start", lambda self, flags, rows_only, first: started.append(flags)
    )
    preset, path = LOOKED_AT[0], f"--config.data.path={site.data}/rows.jsonl"
    make_survey(site.state.checks, [preset, path])
    tab = Tab(browser, server)
    page = tab.page
    tab.open("/data?file=data/rows.jsonl")
    page.get_by_role("heading", name="Rows as the model reads them").wait_for()
    field = page.get_by_label("instruction", exact=True)
    field.press("ArrowDown")
    page.wait_for_url("**instruction=ask**")
    assert started == [[preset, path, "--config.data.columns.instruction=ask"]]
    assert field.input_value() == "ask"
    assert page.evaluate("document.activeElement.id") == "instruction"
    assert tab.faults == []


PATHS = (
    "/", f"/run/runs/{NAME}", f"/compare?run=runs/{NAME}&run=runs/other", "/queue",
    "/remove?run=runs/other", f"/branch?run=runs/{NAME}&step=60&target=x", "/absent",
    "/data?file=data/rows.jsonl", "/data?file=embedded", "/train",
    f"/evaluate?run=runs/{NAME}",
    "/evaluate?flags=--run=", f"/evaluation/runs/{NAME}/evaluations/{DIGEST}",
    "/sweeps", "/sweep/runs/sweep",
    "/deploy?do=promote&run=runs/other&step=3&alias=prod", "/deploy/api",
    "/chat?server=api", "/deploy/hand", "/chat",
)  # fmt: skip


@pytest.mark.parametrize(
    "scheme, width",
    [("dark", 390), pytest.param("light", 1280, marks=pytest.mark.soak)],
)
def test_pages_have_no_serious_fault_of_accessibility(
    browser, served, hand, scheme, width
):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    size = {"width": width, "height": 900}
    state = served[0].state
    make_survey(state.checks, LOOKED_AT)
    own = {"pid": os.getpid(), "born": psutil.Process().create_time()}
    log = str(served[0].runs / "job.log")
    job = QueuedJob("1", ("x", "-m", "y"), "a job", "a", log, "/", "2026", began="2026")
    with state.queue.changing() as jobs:
        jobs.running.append(dataclasses.replace(job, **own))
        jobs.waiting += [dataclasses.replace(job, id=x, began="") for x in "23"]
        jobs.ended += [dataclasses.replace(job, id="4", exit_code=1, said="broken")]
    # The policy forbids the checker's own script; `test_a_page_follows` has it on.
    tab = Tab(browser, served[1], color_scheme=scheme, viewport=size, bypass_csp=True)
    for path in PATHS:
        tab.open(path)
        if path.startswith(("/run/", "/compare")):
            tab.page.locator(".chart canvas").first.wait_for()
        elif path == "/train":
            tab.page.locator("#plans[data-state=ended]").wait_for()
        if scheme == "light":  # The other scheme examines the pages as they open.
            opened = "document.querySelectorAll('details').forEach(x => x.open = true)"
            tab.page.evaluate(opened)
        found = axe.run(tab.page).response
        assert len(found["passes"]) > 5
        serious = [
            (x["id"], [node["target"] for node in x["nodes"]])
            for x in found["violations"]
            if x["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
        wide = tab.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{path} is wider than the screen"


def test_the_keyboard_reaches_runs_and_a_page_without_scripts_has_numbers(
    browser, served
):
    tab = Tab(browser, served[1], java_script_enabled=False)
    page = tab.page
    page.keyboard.press("Tab")
    assert "Skip to the content" in page.locator(":focus").inner_text()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.locator(":focus").get_attribute("href") == f"/run/runs/{NAME}":
            break
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/run/"))
    assert page.locator(".state").inner_text() == "running"
    loss = page.locator('[data-chart="loss"]')
    assert not loss.locator(".chart").is_visible()
    loss.locator("summary").press("Enter")
    assert loss.locator("tbody tr").last.inner_text().split() == ["79", "0.03797"]
    page.get_by_label("Tags").fill("seen")
    page.get_by_role("button", name="Save").click()
    page.locator(".tag", has_text="seen").wait_for()


@pytest.fixture
def hand(served, socket_folder):
    """A server `hand` with the models `base` and `tuned`, that says their names."""
    fake = FakeUpstream(socket_folder / "hand", said_by_models)
    servers = served[0].runs / ".studio" / "servers"
    list_server(servers, "hand", uds=str(fake.path))
    yield fake
    fake.stop()


def test_models_answer_side_by_side_and_a_reload_shows_them(browser, served, hand):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = Tab(browser, served[1])
    page = tab.page
    tab.open("/chat")
    page.get_by_text("System text and context").click()
    page.get_by_label("Context").fill("A passage.")
    page.get_by_label("Message").fill("Why?")
    page.get_by_label("Message").press("Control+Enter")
    tuned = page.get_by_label("Answer of tuned")
    token = tuned.locator(".more-2").first
    token.wait_for()
    assert token.inner_text() == "tuned"
    assert "difference +2.50" in token.get_attribute("title")
    assert "3 prompt tokens" in tuned.inner_text()
    asked = [json.loads(body) for top, body in hand.requests if "/chat/" in top]
    assert len(asked) == 2 and asked[0] | {"model": ""} == asked[1] | {"model": ""}
    assert (asked[0]["context"], asked[0]["seed"]) == ("A passage.", 1)
    tuned.get_by_role("button", name="show").click()
    tuned.get_by_text("<user>Why?").wait_for()
    tuned.get_by_text("Tokens (2)").click()
    assert tuned.locator("tbody tr").first.inner_text().split("\t")[1:] == [
        "5", "-0.500", "-3.000", "+2.50",
    ]  # fmt: skip
    # Another version of the turn is a branch; the first one stays.
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Message").first.fill("Why not?")
    page.get_by_role("button", name="Ask this instead").click()
    page.get_by_text("version 2 of 2").wait_for()
    page.locator(".more-2").first.wait_for()
    page.get_by_role("checkbox", name="blind vote").check()
    page.get_by_role("button", name="Answer again").click()
    page.get_by_text("Which is best?").wait_for()
    assert page.get_by_label("Answer of A").is_visible()
    assert page.get_by_label("Answer of tuned").count() == 0
    # Nothing but the text tells them apart.
    shown = page.locator(".answer").last.evaluate("x => x.parentElement.innerHTML")
    assert "fp_" not in shown and "picked" not in shown and "a second" not in shown
    page.get_by_role("button", name="A", exact=True).click()
    page.get_by_text("You chose").wait_for()
    page.get_by_role("heading", name="Blind votes").wait_for()
    page.get_by_text("Use as a training row").click()
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_text("added to data/chats.jsonl").wait_for()
    page.reload()
    page.get_by_text("answers 2 of 2").wait_for()
    page.get_by_text("You chose").wait_for()
    page.get_by_label("Earlier version").click()
    page.get_by_text("version 1 of 2").wait_for()
    assert page.locator(".asked").inner_text() == "Why?"
    assert tab.faults == []
    url = page.url.removeprefix(tab.url)
    size = {"width": 390, "height": 900}
    tab = Tab(browser, served[1], color_scheme="dark", viewport=size, bypass_csp=True)
    tab.open(url)
    tab.page.locator(".more-2").first.wait_for()
    found = axe.run(tab.page).response["violations"]
    serious = [x["id"] for x in found if x["impact"] in ("serious", "critical")]
    assert serious == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_server_that_ends_in_an_answer_is_said_and_the_rest_is_kept(
    browser, served, hand
):
    def dies(connection, fake):
        top, body = fake.requests[-1]
        if "/chat/" not in top or json.loads(body)["model"] == "base":
            said_by_models(connection, fake)
            return
        event = {"choices": [{"delta": {"content": "half"}, "token_ids": [5]}]}
        event["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1}]}
        connection.sendall(head(200, "text/event-stream", transfer_encoding="chunked"))
        connection.sendall(chunk(f"data: {json.dumps(event)}\n\n"))

    hand._answer = dies
    tab = Tab(browser, served[1])
    page = tab.page
    tab.open("/chat")
    page.get_by_label("colour tokens").uncheck()
    page.get_by_label("Message").fill("Why?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("ended in the middle of an answer").wait_for()
    page.get_by_text("The answers are complete.").wait_for(state="attached")
    page.reload()
    tuned = page.get_by_label("Answer of tuned")
    tuned.get_by_text("half").wait_for()
    assert "ended in the middle" in tuned.inner_text()
    assert "base says <b>" in page.get_by_label("Answer of base").inner_text()


def test_a_page_waits_for_models_that_load(browser, served, hand):
    is_ready = threading.Event()

    def loads(connection, fake):
        if is_ready.is_set() or "/health" not in fake.requests[-1][0]:
            said_by_models(connection, fake)
            return
        body = b'{"error": {"code": "loading", "message": "the model is loading"}}'
        start = head(503, "application/json", content_length=len(body))
        connection.sendall(start + body)

    hand._answer = loads
    log = served[0].runs / ".studio" / "servers" / "hand" / "log"
    log.write_text("reading the base model\n")
    tab = Tab(browser, served[1])
    tab.page.clock.install()
    tab.open("/chat")
    tab.page.get_by_text("reading the base model").wait_for()
    log.write_text("compiling\n")
    tab.page.clock.fast_forward(LOOK)
    tab.page.get_by_text("compiling").wait_for()
    is_ready.set()
    tab.page.clock.fast_forward(LOOK)
    tab.page.get_by_label("Message").wait_for()
    assert tab.faults == []


@pytest.mark.soak
def test_scores_of_a_model_that_has_moved_on_are_not_shown(browser, served, hand):
    def moved(connection, fake):
        top, body = fake.requests[-1]
        if "/v1/completions" in top and json.loads(body)["model"] == "tuned":
            scores = {"logprobs": {"token_logprobs": [None] + [-0.5] * 4}}
            found = {"choices": [scores], "system_fingerprint": "fp_newer"}
            reply(connection, found)
        else:
            said_by_models(connection, fake)

    hand._answer = moved
    tab = Tab(browser, served[1])
    page = tab.page
    tab.open("/chat")
    page.get_by_label("Message").fill("Why?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("tuned is another one now than the one that answered").wait_for()
    assert page.get_by_label("Answer of tuned").get_by_text("Tokens (2)").is_visible()
    assert page.get_by_label("Answer of tuned").locator(".tok").count() == 0
