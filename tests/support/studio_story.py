"""The whole story of the studio in a real browser, beside the other tests.

From a CSV file to a client of the served model; the studio is killed in the middle.
"""

import csv
import dataclasses
import json
import re
import subprocess
import sys
import time

from commands import chain
from studio_process import StudioProcess
from tiny_model import make_tiny_model
from waiting import wait_until

# A tiny model on short rows: it trains until somebody stops it.
KNOBS = {
    "model.init_from": "runs/model", "steps": "100000", "data.seq_len": "128",
    "data.batch_size": "4", "data.microbatch_size": "4", "data.held_out": "4",
    "lora.rank": "4", "run_dir": "runs/whales",
    "model.dtype": "float32", "optim.learning_rate": "3e-3", "optim.warmup": "0",
    "eval.every": "500", "eval.prompts": "1", "eval.max_new_tokens": "4",
    "eval.answers_rows": "0",
    "checkpoint.every": "1000", "runtime.peak_tflops": "0.05",
}  # fmt: skip
QUESTION = "How long is a whale?"
# The answer of each row: the model learns it soon, whatever it is asked, and keeps it.
LEARNED = "30 m"
ENOUGH = 60  # steps until it surely has; ten are enough
WATCHED = 5.0  # seconds


@dataclasses.dataclass
class Story:
    """The files and figures that it leaves.

    Attributes:
      folder: of the studio.
      faults: errors in the browser.
      share: of a core that the server took while a tab watched a run that trains.
      megabytes: that it had then.
      answers: status and fingerprint of requests while the alias moved.
    """

    folder: object
    faults: list = dataclasses.field(default_factory=list)
    share: float = 1.0
    megabytes: float = 0.0
    answers: list = dataclasses.field(default_factory=list)


@chain
def story(place, results):
    from browser_tab import chromium  # Late: most tests need no studio.

    studio = made(place)
    try:
        with chromium() as browser:
            return tell(browser, studio.start())
    except Exception as error:
        raise AssertionError(f"{error}\n{studio.logs()}") from error
    finally:
        studio.end_all()


def made(place):
    """A folder with a model and a file of rows."""
    folder = place.folder / "story"
    make_tiny_model(folder / "runs" / "model")
    with (folder / "whales.csv").open("w", newline="") as file:
        write = csv.writer(file).writerow
        write(["ask", "passage", "reply", "kind"])
        for n in range(60):
            ask, passage = f"How long is whale {n}?", f'Whale {n}, "Moby".'
            write([ask, passage, LEARNED, "size"])
        write(["A question without an answer?", "", "", "size"])
    return StudioProcess(folder, place.cache)


def tell(browser, studio):
    found = Story(studio.folder)
    tab = opened(browser, studio)
    try:
        upload_and_map(tab, studio)
        start_training(tab)
        watch(tab, studio, found)
        found.faults += tab.faults
        tab = survive_a_kill(browser, studio, tab)
        stop_and_resume(tab, studio)
        deploy_and_call(tab)
        compare_in_chat(tab)
        move_the_alias(tab, found)
        stop_serving(tab, studio)
    except Exception as error:
        shown = tab.page.locator("main").inner_text()
        raise AssertionError(
            f"{tab.page.url} {tab.faults}\n{shown}\n{error}"
        ) from error
    found.faults += tab.faults
    return found


def opened(browser, studio):
    from browser_tab import Tab

    return Tab(browser, studio)


def step_of(page):
    shown = page.locator('[data-figure="step"]').inner_text().replace(",", "")
    return int(shown) if shown.isdecimal() else 0  # A dash before the first step.


def wait_for_step(page, step):
    wait_until(lambda: step_of(page) >= step)


def wait_for_state(page, state):
    page.locator('[data-figure="state"]').filter(has_text=state).wait_for()


def upload_and_map(tab, studio):
    """Uploads the file, says what its columns are, and sees what is trained."""
    page = tab.page
    tab.open("/data")
    page.locator("input[type=file]").set_input_files(studio.folder / "whales.csv")
    page.get_by_role("button", name="Upload to data").click()
    page.wait_for_url("**/data?file=*")
    page.get_by_label("instruction", exact=True).select_option("ask")
    page.get_by_label("context", exact=True).select_option("passage")
    page.get_by_label("response", exact=True).select_option("reply")
    page.get_by_label("category", exact=True).select_option("kind")
    page.get_by_role("button", name="Look at the rows").click()
    page.locator("pre.tokens mark").first.wait_for()
    row = page.locator("pre.tokens").first
    trained = "".join(row.locator("mark").all_inner_texts())
    assert " m" in trained and "How long" not in trained
    assert "How long is whale" in row.inner_text() and "Moby" in row.inner_text()
    assert "whales.csv:" in page.content()
    findings = page.get_by_role("region", name="findings")
    findings.get_by_text("60: size 60", exact=True).wait_for()  # Rows by category.


def start_training(tab):
    """Fills the form from the flags of the Data page, then starts."""
    page = tab.page
    page.get_by_role("link", name="Train on these").click()
    for group in page.locator("details[data-group]").all():
        group.evaluate("group => { group.open = true; }")
    for knob, value in KNOBS.items():
        field = page.locator(f'[name="knob.{knob}"]')
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    page.get_by_role("button", name="Show the command").click()
    command = page.locator("main pre").filter(has_text="runs/whales").first.inner_text()
    for part in ("--config.data.columns.instruction=ask", "data/whales.csv"):
        assert part in command
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/queue*")


def watch(tab, studio, found):
    """The curve moves, and the server has little to do."""
    page = tab.page
    page.get_by_role("link", name="runs/whales").click()
    wait_for_state(page, "running")
    page.get_by_text("live", exact=True).wait_for()
    first = page.locator('[data-figure="loss"]').inner_text()
    step, begun, cpu = step_of(page), time.monotonic(), studio.cpu()
    wait_for_step(page, step + 20)
    # A page has come, and a stream of lines: many a second, as each step is short.
    wait_until(lambda: time.monotonic() - begun > WATCHED)
    found.share = (studio.cpu() - cpu) / (time.monotonic() - begun)
    found.megabytes = studio.megabytes()
    wait_until(lambda: page.locator('[data-figure="loss"]').inner_text() != first)
    assert page.locator('[data-chart="loss"] canvas').count() == 1


def survive_a_kill(browser, studio, tab):
    """Closes the tab and kills the studio: the training continues, and is shown."""
    before = step_of(tab.page)
    (trainer,) = trainers(studio)
    tab.page.close()
    studio.kill()
    metrics = studio.folder / "runs" / "whales" / "metrics.jsonl"
    size = metrics.stat().st_size
    wait_until(lambda: metrics.stat().st_size > size)
    assert [x.pid for x in trainers(studio)] == [trainer.pid]
    tab = opened(browser, studio.start())
    tab.open("/run/runs/whales")
    wait_for_state(tab.page, "running")
    wait_for_step(tab.page, before + 1)  # It may evaluate, which takes no step.
    wait_for_step(tab.page, step_of(tab.page) + 5)
    return tab


def trainers(studio):
    """The processes that train."""
    lock = str(studio.folder / "runs" / "whales" / "lock")
    return [
        process
        for process in studio.all()
        if any(file.path == lock for file in process.open_files())
    ]


def stop_and_resume(tab, studio):
    """Twice, so that the run has two checkpoints at the end.

    However slow the machine is, the last has learned what `compare_in_chat` asks.
    """
    page = tab.page
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_for_state(page, "stopped")
    # Its page asks nobody to load it again.
    page.get_by_role("button", name="Resume").wait_for()
    stopped = step_of(page)
    assert f"from step {stopped}" in page.locator("main").inner_text()
    page.get_by_role("button", name="Resume").click()
    page.wait_for_url("**/queue*")
    tab.open("/run/runs/whales")
    wait_for_state(page, "running")
    wait_for_step(page, max(stopped + 5, ENOUGH))
    save_and_answer_now(page, studio.folder / "runs" / "whales" / "checkpoints")
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_for_state(page, "stopped")


def save_and_answer_now(page, checkpoints):
    """A checkpoint appears on the disk, and an answer on the page, while it trains."""

    def saved():
        return {x.name for x in checkpoints.iterdir() if x.name.isdecimal()}

    before = saved()
    page.get_by_role("button", name="Checkpoint now").click()
    page.get_by_text("checkpoint: the job acts after the step in hand").wait_for()
    wait_until(lambda: saved() - before)
    assert not page.get_by_role("heading", name="Samples").is_visible()
    page.get_by_role("button", name="Sample now").click()
    sample = page.locator("[data-samples] .panel").first
    sample.wait_for()
    assert "How long is whale" in sample.inner_text()


def promote(tab, step):
    """Moves `prod` to a checkpoint of the run; its newest if `step` is empty."""
    page = tab.page
    tab.open("/deploy")
    page.get_by_text("Promote a run").click()
    page.locator("#promoted").select_option("runs/whales")
    page.locator("#step").fill(step)
    form = page.locator("form", has=page.locator("#alias"))
    form.get_by_role("button", name="Show the command").click()
    page.get_by_role("button", name="Move the alias").click()
    page.get_by_text("servers of it follow").wait_for()


def deploy_and_call(tab):
    """Promotes, serves the alias, and asks it with what the page says to paste."""
    page = tab.page
    promote(tab, "")
    if not page.locator("#served").is_visible():  # It is open where none runs.
        page.get_by_text("Start a server").click()
    page.get_by_label("Runs and aliases").select_option("runs/prod")
    page.locator("#slots").fill("2")
    serve = page.locator("form", has=page.locator("#slots"))
    serve.get_by_role("button", name="Show the command").click()
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/deploy/api*")
    page.locator('[data-figure="state"]', has_text="ready").wait_for()
    page.get_by_label("New key for").fill("the story")
    page.get_by_role("button", name="Make a key").click()
    page.get_by_text("It is shown this once").wait_for()
    tab.shell, program = (
        page.locator("h2:has-text('Ask it') ~ .command pre").nth(n).inner_text()
        for n in (0, 1)
    )
    answer = ask(tab.shell)
    assert answer["model"] == "prod", answer
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    said = answer["choices"][0]["message"]["content"]
    assert ended.stdout.removesuffix("\n") == said, "one request, one answer"
    page.locator('[data-figure="answers"]', has_text="2").wait_for()


def ask(shell):
    """The answer to the command that the page has to paste."""
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert ended.returncode == 0, ended
    return json.loads(ended.stdout)


def compare_in_chat(tab):
    """Base and tuned answer one question: only the tuned one as the rows do."""
    page = tab.page
    tab.open("/chat")
    page.get_by_text("Sampling:").click()
    page.get_by_label("Temperature", exact=True).fill("0")  # A draw could be any token.
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("The answers are complete.").wait_for(state="attached")
    base, tuned = (
        page.get_by_role("article", name=f"Answer of {name}")
        .locator(".answer-text")
        .inner_text()
        for name in ("base", "prod")
    )
    assert LEARNED not in base
    assert tuned.strip().removesuffix("<|im_end|>") == LEARNED


def move_the_alias(tab, found):
    """Promotes the checkpoint before: requests are answered all the while."""
    steps = (found.folder / "runs" / "whales" / "checkpoints").iterdir()
    first, *_, newest = sorted(int(x.name) for x in steps if x.name.isdecimal())
    assert first < newest
    short = re.sub(r'("max_tokens": )\d+', r"\g<1>4", tab.shell)
    found.answers = [ask(short)["system_fingerprint"]]
    promote(tab, str(first))

    def has_moved():
        found.answers.append(ask(short)["system_fingerprint"])
        return found.answers[-1] != found.answers[0]

    wait_until(has_moved)


def stop_serving(tab, studio):
    tab.open("/deploy/api")
    tab.page.get_by_role("button", name="Stop", exact=True).click()
    wait_until(lambda: not serving(studio))


def serving(studio):
    return [x for x in studio.all() if "research.serve" in (x.info["cmdline"] or ())]
