"""Chromium, and a tab of it that reaches nothing but the studio."""

import contextlib
import shutil

import pytest
from studio_place import TOKEN
from waiting import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@contextlib.contextmanager
def chromium():
    """The browser; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield found
        found.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


class Tab:
    """A page of a browser that reaches nothing but the studio."""

    def __init__(self, browser, server, **more):
        context = browser.new_context(**more)
        self.faults = []
        context.route(
            lambda url: not url.startswith(server.url),
            lambda route: (self.faults.append(route.request.url), route.abort()),
        )
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._note)
        self.url = server.url
        self.page.goto(f"{self.url}/?token={TOKEN}")

    def _note(self, message):
        if message.type == "error" and "ERR_CONNECTION" not in message.text:
            self.faults.append(message.text)

    def open(self, path):
        self.page.goto(self.url + path)
