"""The whole story in a real browser: from a CSV file to a client of the served model.

The studio is a process of its own, and is killed in the middle.
"""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from browser_tab import Tab
from browser_tab import browser as browser
from studio_place import TOKEN
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
# A tiny model on short rows, many of them: it trains until somebody stops it.
KNOBS = {
    "model.init_from": "runs/model", "steps": "100000", "data.seq_len": "128",
    "data.batch_size": "4", "data.microbatch_size": "4", "data.held_out": "4",
    "lora.rank": "4", "run_dir": "runs/whales",
    "model.dtype": "float32", "optim.learning_rate": "1e-2",
    "eval.every": "500", "eval.prompts": "0", "eval.answers_rows": "0",
    "checkpoint.every": "200", "runtime.peak_tflops": "0.05",
}  # fmt: skip
QUESTION = "How long is a whale?"


class Studio:
    """The command, in a folder with a model, and all that it has started."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, 0, None
        self._log = folder / "studio.log"

    def start(self):
        """Starts it at the port that it had, and waits for its address."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env = kept | {
            "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.folder / "cache"),
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "research.studio", f"--port={self.port}"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log
            )
        until(lambda: "studio: http" in self._log.read_text(), self._log)
        line = self._log.read_text().partition("studio: ")[2].split()[0]
        self.url = line.partition("/?")[0]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self):
        """SIGKILL: it can tidy nothing up."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def end_all(self):
        """Ends the studio and every process in its folder."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
            self.process.wait(20)
        for process in psutil.process_iter(["cwd", "pid"]):
            if process.info["cwd"] == str(self.folder):
                with contextlib.suppress(psutil.Error):
                    process.kill()
                    process.wait(20)


def until(condition, log=None, seconds=300):
    over = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < over, log.read_text() if log else condition
        time.sleep(0.2)


@pytest.fixture
def studio(tmp_path):
    folder = tmp_path.resolve() / "home"
    make_tiny_model(folder / "runs" / "model")
    token = folder / "cache" / "research" / "studio_token"
    token.parent.mkdir(parents=True)
    token.write_text(TOKEN)
    with (folder / "whales.csv").open("w", newline="") as file:
        write = csv.writer(file).writerow
        write(["ask", "passage", "reply", "kind"])
        for n in range(60):
            write([f"How long is whale {n}?", f'Whale {n}, "Moby".', f"{n} m", "size"])
        write(["A question without an answer?", "", "", "size"])
    started = Studio(folder).start()
    yield started
    started.end_all()
    for log in (*folder.rglob("*.log"), *folder.rglob("servers/*/log")):
        print(log, log.read_text()[-3000:], sep="\n")  # Shown if the test fails.


def step_of(page):
    shown = page.locator('[data-figure="step"]').inner_text().replace(",", "")
    return int(shown) if shown.isdecimal() else 0  # A dash before the first step.


def wait_for_step(page, step):
    until(lambda: step_of(page) >= step)


def wait_for_state(page, state):
    found = page.locator('[data-figure="state"]').filter(has_text=state)
    found.wait_for(timeout=90_000)


@pytest.mark.soak
def test_the_whole_story(browser, studio, monkeypatch):
    tab = Tab(browser, studio)
    tab.page.set_default_timeout(90_000)
    upload_and_map(tab, studio)
    start_training(tab)
    page = tab.page
    page.get_by_role("link", name="runs/whales").click()
    wait_for_state(page, "running")
    page.get_by_text("live", exact=True).wait_for()
    first = page.locator('[data-figure="loss"]').inner_text()
    wait_for_step(page, step_of(page) + 20)
    assert page.locator('[data-figure="loss"]').inner_text() != first
    assert page.locator('[data-chart="loss"] canvas').count() == 1
    tab = survive_a_kill(browser, studio, tab)
    stop_and_resume(tab)
    for part in (compare_in_chat, deploy_and_call):
        try:
            part(tab, studio)
        except Exception:
            print(tab.page.url, tab.faults, tab.page.locator("main").inner_text())
            raise
    assert tab.faults == []


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
    command = page.locator("main pre").filter(has_text="runs/whales").last.inner_text()
    for part in ("--config.data.columns.instruction=ask", "data/whales.csv"):
        assert part in command
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/queue*")


def survive_a_kill(browser, studio, tab):
    """Closes the tab and kills the studio: the training continues, and is shown."""
    before = step_of(tab.page)
    (trainer,) = trainers(studio)
    tab.page.close()
    studio.kill()
    time.sleep(1.0)
    assert [x.pid for x in trainers(studio)] == [trainer.pid]
    studio.start()
    tab = Tab(browser, studio)
    tab.page.set_default_timeout(90_000)
    tab.open("/run/runs/whales")
    wait_for_state(tab.page, "running")
    assert step_of(tab.page) > before
    wait_for_step(tab.page, step_of(tab.page) + 5)
    return tab


def trainers(studio):
    """The processes that train."""
    lock = studio.folder / "runs" / "whales" / "lock"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(x.path == str(lock) for x in process.open_files()):
                found.append(process)
    return found


def stop_and_resume(tab):
    page = tab.page
    wait_for_step(page, 210)  # So that there are two checkpoints at the end.
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
    wait_for_step(page, stopped + 5)
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_for_state(page, "stopped")


def compare_in_chat(tab, studio):
    """Base and tuned answer one question; the server is ended afterwards."""
    page = tab.page
    tab.open("/chat")
    page.get_by_label("Run 1").select_option("runs/whales")
    page.get_by_role("button", name="Show the command").click()
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_label("Message").wait_for()
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("The answers are complete.").wait_for(state="attached")
    base, tuned = (
        page.get_by_role("article", name=f"Answer of {name}").locator(".answer-text")
        for name in ("base", "whales")
    )
    assert base.inner_text().strip() != tuned.inner_text().strip()
    assert re.search(r"[0-9]", tuned.inner_text()), "it was trained on lengths"
    page.get_by_role("button", name="Stop", exact=True).click()
    until(lambda: not serving(studio))


def deploy_and_call(tab, studio):
    """Promotes, serves the alias, and asks it with what the page says to paste."""
    page = tab.page
    tab.open("/deploy")
    page.get_by_text("Promote a run").click()
    page.locator("#promoted").select_option("runs/whales")
    promote = page.locator("form", has=page.locator("#alias"))
    promote.get_by_role("button", name="Show the command").click()
    page.get_by_role("button", name="Move the alias").click()
    page.get_by_text("runs/prod", exact=True).first.wait_for()
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
    shell, program = (
        page.locator("h2:has-text('Ask it') ~ .command pre").nth(n).inner_text()
        for n in (0, 1)
    )
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    answer = json.loads(ended.stdout)
    assert answer["model"] == "prod", ended
    said = answer["choices"][0]["message"]["content"]
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.removesuffix("\n") == said, "one request, one answer"
    page.locator('[data-figure="answers"]', has_text="2").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    until(lambda: not serving(studio))


def serving(studio):
    return [
        x
        for x in psutil.process_iter(["cmdline", "cwd"])
        if x.info["cwd"] == str(studio.folder)
        and "research.serve" in (x.info["cmdline"] or ())
    ]
