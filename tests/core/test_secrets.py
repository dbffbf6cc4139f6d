"""Secrets in the environment stay there: no log, file or error shows them."""

import contextlib
import http.server
import threading

import pytest
from commands import SECRETS, chain
from process_pairs import hang


class Hub(http.server.BaseHTTPRequestHandler):
    """Keeps what each request carried, and lets nobody in."""

    carried = ()

    def do_GET(self):
        self.carried.append(self.headers.get("Authorization", ""))
        self.send_response(401)
        self.send_header("X-Error-Message", "Invalid username or password.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def refusing_hub():
    """Gives the environment that leads to it, and the list of what came with tokens."""
    carried = []
    handler = type("Hub", (Hub,), {"carried": carried})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}, carried
        server.shutdown()


@chain
def with_secrets(place, results):
    """A run that ends, and some that fail: at a row, at the hub, and by a bug of ours.

    Returns:
      How each command ended, by name, and what the hub was sent.
    """

    whole = results("unbroken")

    def flags(name, *more):
        return "--config=config.py", f"--config.run_dir=runs/secrets-{name}", *more

    (place.folder / "bad-row.jsonl").write_text('{"instruction": "a", "response": 3}')
    # Before the first step, which would be compiled.
    bug = hang("1 / 0", batch=-1)
    ended = {
        "whole": whole,
        "bug": place.run("train", *flags("bug"), program=bug, more=SECRETS),
        "slurm": place.launch(("slurm", "--dry-run"), flags("slurm"), more=SECRETS),
    }
    refused = {
        "bad row": "--config.data.path=bad-row.jsonl",
        "hub": "--config.model.init_from=hub://nobody/nothing",
    }
    with refusing_hub() as (there, carried):
        ended |= place.run_short(
            {
                name: (place, "train", flags(name.replace(" ", "-"), flag), 1)
                for name, flag in refused.items()
            },
            SECRETS | there,
        )
    return ended, carried


def leaks(data):
    return [name for name, secret in SECRETS.items() if secret.encode() in data]


def test_the_search_of_this_file_finds():
    assert leaks(b"x" + SECRETS["HF_TOKEN"].encode() + b"\0") == ["HF_TOKEN"]


@pytest.mark.parametrize(
    "name, code", [("whole", 0), ("bug", 1), ("bad row", 2), ("hub", 2), ("slurm", 0)]
)
def test_nothing_is_printed(with_secrets, name, code):
    finished = with_secrets[0][name]
    assert finished.code == code, finished.err
    assert leaks((finished.out + finished.err).encode()) == []


def test_the_failures_were_those_that_could_tell(with_secrets):
    """The token went to the hub and was refused; the bug showed where it was."""
    ended, carried = with_secrets
    assert f"Bearer {SECRETS['HF_TOKEN']}" in carried
    assert "401" in ended["hub"].err
    assert "Traceback" in ended["bug"].err and "ZeroDivisionError" in ended["bug"].err
    assert "#!/bin/bash" in ended["slurm"].out


def contents(folder):
    """Bytes of all files below; other commands make and remove some meanwhile."""
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            yield file, file.read_bytes()


def test_nothing_is_written(place, with_secrets):
    found = [pair for f in (place.folder, place.cache) for pair in contents(f)]
    run = place.run_dir("unbroken")
    names = {file.name for file, _ in found if run in file.parents}
    kinds = {"run.json", "config.json", "metrics.jsonl", "report.md", "sums.json"}
    assert kinds < names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert any(place.cache in file.parents for file, _ in found)
    assert {str(file): there for file, data in found if (there := leaks(data))} == {}
