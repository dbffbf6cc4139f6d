"""Files that the studio serves and receives: vendored as listed, streamed, confined."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from waiting import PATIENCE

from research.studio.app import STATIC, _answer_error
from research.studio.page_errors import PageError
from research.studio.pages.page_view import TEMPLATES, json_answer
from research.studio.uploads import plain_name, receive_upload

VENDOR = STATIC / "vendor"


def test_vendored_files_are_those_that_are_listed_with_their_licences():
    listed = dict(
        reversed(line.split())
        for line in (VENDOR / "sha256.txt").read_text().split("\n")
        if line
    )
    files = [x for x in VENDOR.rglob("*") if x.is_file()]
    found = {
        str(file.relative_to(VENDOR)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in ("README.md", "sha256.txt")
    }
    assert found == listed
    readme = (VENDOR / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in listed)


def test_no_file_of_ours_names_another_host():
    ours = [*TEMPLATES.iterdir(), *STATIC.glob("*.*"), *STATIC.glob("p*/*.js")]
    assert len(ours) > 12
    for file in ours:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|\beval\b", text), file
        assert "| safe" not in text and "autoescape" not in text, file


def test_the_keyboard_can_scroll_every_wide_table():
    for file in TEMPLATES.iterdir():
        for area in re.findall(r'<div class="scroll[^>]*>', file.read_text()):
            assert 'tabindex="0" role="region" aria-label="' in area, file


def receiver(folder, limit):
    async def put(request):
        name = request.path_params["name"]
        found = await receive_upload(request, folder, name, limit)
        return json_answer({"size": found.size, "sha256": found.sha256})

    route = Route("/data/{name:path}", put, methods=["PUT"])
    return TestClient(
        Starlette(routes=[route], exception_handlers={PageError: _answer_error})
    )


def test_an_upload_arrives_whole_or_not_at_all(tmp_path):
    client = receiver(tmp_path, 1000)
    answer = client.put("/data/rows.csv", content=b"x" * 1000)
    digest = hashlib.sha256(b"x" * 1000).hexdigest()
    assert answer.json() == {"size": 1000, "sha256": digest}
    assert (tmp_path / "rows.csv").read_bytes() == b"x" * 1000

    def chunks():  # A length that nobody has said.
        for _ in range(11):
            yield b"y" * 100

    assert client.put("/data/other.csv", content=chunks()).status_code == 413
    assert client.put("/data/other.csv", content=b"y" * 1001).status_code == 413
    assert client.put("/data/rows.csv", content=b"z").status_code == 409
    assert [x.name for x in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".hidden", "a\\b", "a\0b", "a\nb", "", "é" * 101]
)
def test_a_name_with_a_folder_in_it_is_none(name):
    with pytest.raises(PageError):
        plain_name(name)


def test_an_upload_replaces_no_link(tmp_path):
    (tmp_path / "rows.csv").symlink_to(tmp_path / "nowhere")
    assert receiver(tmp_path, 9).put("/data/rows.csv", content=b"x").status_code == 409


def test_the_door_serves_without_jax_in_little_memory(tmp_path):
    """From the first word to SIGTERM; the printed address opens the list."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "research.studio", "--port=0"]
    folders = [f"--runs={tmp_path / 'runs'}", f"--data={tmp_path / 'data'}"]
    program = subprocess.Popen(
        [*command, *folders],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = program.stdout.readline().split()[1]
        import httpx

        with httpx.Client(
            follow_redirects=True, headers={"accept": "text/html"}, timeout=PATIENCE
        ) as web:
            assert "There are no runs yet" in web.get(address).text
        memory = Path(f"/proc/{program.pid}/status").read_text()
        assert int(re.search(r"VmRSS:\s+(\d+) kB", memory)[1]) < 100_000
        assert "libjax" not in Path(f"/proc/{program.pid}/maps").read_text()
    finally:
        program.terminate()
        _, said = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0 and "ssh -L" in said and "Traceback" not in said
