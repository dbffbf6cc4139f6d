"""The studio's figures: first paint, memory, and CPU of the server, lists and curves.

    PYTHONPATH=.:tests/support .venv/bin/python tests/bench/studio_figures.py [--runs=N]

CPU seconds are those of the server's process, the best of several; a busy machine
makes wall times longer and these hardly. The browser's times are walls, the best too.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
from served_studio import append
from studio_place import eval_line, make_run, train_line

from research.studio.pages.page_view import TABS

TRIES = 5
LONG = 100_000  # lines of a long run
WATCHED = 30.0  # seconds of a run that trains


class Server:
    """`python -m research.studio` over a folder, with its token."""

    def __init__(self, folder: Path):
        log = folder / "log"
        place = [f"--runs={folder}/runs", f"--data={folder}/data", "--port=0"]
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "research.studio", *place],
                stdout=file,
                stderr=file,
                env=os.environ | cache,
            )
        while not (text := log.read_text()).endswith("\n"):
            time.sleep(0.02)
        self.entrance = text.partition("studio: ")[2].split()[0]
        self.url = self.entrance.partition("/?")[0]
        self.client = httpx.Client(follow_redirects=True, timeout=60)
        self.client.get(self.entrance)
        self._measured = psutil.Process(self.process.pid)

    def cpu(self) -> float:
        times = self._measured.cpu_times()
        return times.user + times.system

    def megabytes(self) -> float:
        return self._measured.memory_info().rss / 1e6

    def cost(self, path: str) -> tuple[float, float]:
        """CPU and wall seconds of one request."""
        cpu, wall = self.cpu(), time.perf_counter()
        self.client.get(self.url + path).raise_for_status()
        return self.cpu() - cpu, time.perf_counter() - wall

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        lines = [train_line(n, 2 + math.sin(n) / 7) for n in range(1, 301)]
        lines = [eval_line(0, 3.0, qa=3.1), *lines]
        for number in range(options.runs):
            make_run(folder / "runs" / f"run-{number:03}", "stopped", lines)
        make_run(
            folder / "runs" / "long",
            "stopped",
            [train_line(n, 2 + math.sin(n) / 7) for n in range(1, LONG + 1)],
        )
        measure(folder, options.runs)


def measure(folder: Path, runs: int) -> None:
    """Prints one figure a line."""
    lists, curves = [], []
    for _ in range(TRIES):
        server = Server(folder)
        try:
            start = server.megabytes()
            cold_list = server.cost("/")
            cold_curves = server.cost("/api/curves?run=runs/long")
            lists.append((cold_list, server.cost("/")))
            curves.append((cold_curves, server.cost("/api/curves?run=runs/long")))
            grown = server.megabytes()
        finally:
            server.stop()
    show(f"list of {runs} runs", lists)
    show(f"curves of {LONG:,} lines", curves)
    print(f"memory: {start:.0f} MB at the start, {grown:.0f} MB with the long run open")
    server = Server(folder)
    try:
        first_paints(server)
        follow(server, folder)
    finally:
        server.stop()


def show(name: str, tries: list[tuple[tuple[float, float], ...]]) -> None:
    """The best of each, of a server that has just begun, and of one that knows it."""
    for state, found in zip(("cold", "warm"), zip(*tries, strict=True), strict=True):
        cpu, wall = (min(values) for values in zip(*found, strict=True))
        print(
            f"{name}, {state}: {cpu:.3f} s of CPU, {wall:.3f} s wall, best of {TRIES}"
        )


def first_paints(server: Server) -> None:
    """The first contentful paint of each page, from the start of its request."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    tabs = [path for path, _ in TABS]
    pages = (*tabs, "/run/runs/run-000", "/run/runs/long")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context()
        context.new_page().goto(server.entrance)
        for path in pages:
            found = []
            for _ in range(TRIES):
                page = context.new_page()
                page.goto(server.url + path)
                found.append(page.evaluate(PAINT))
                page.close()
            print(f"first paint of {path}: {min(found) / 1000:.3f} s, best of {TRIES}")
        browser.close()


PAINT = """() => new Promise((resolve) => new PerformanceObserver((list) => {
  const [found] = list.getEntriesByName("first-contentful-paint");
  if (found) resolve(found.startTime);
}).observe({ type: "paint", buffered: true }))"""


def follow(server: Server, folder: Path) -> None:
    """A tab watches a run that writes two lines a second."""
    run = make_run(folder / "runs" / "live", "killed", [train_line(1)])
    ended = threading.Event()

    def watch() -> None:
        with server.client.stream("GET", f"{server.url}/api/events?run=runs/live") as x:
            for _ in x.iter_raw():
                if ended.is_set():
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(2)
    begun, cpu = time.monotonic(), server.cpu()
    for step in range(2, round(2 * WATCHED) + 2):
        append(run, train_line(step))
        time.sleep(max(0.0, begun + step / 2 - time.monotonic()))
    share = (server.cpu() - cpu) / (time.monotonic() - begun)
    ended.set()
    append(run, train_line(10_000))
    watcher.join(20)
    memory = f"{server.megabytes():.0f} MB"
    print(f"a run that trains, one tab: {share:.2%} of a core, {memory}")


if __name__ == "__main__":
    main()
