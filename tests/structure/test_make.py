"""The Makefile and the search for an interpreter."""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from commands import ROOT


def test_make_help_lists_every_target():
    make = shutil.which("make") or pytest.skip("no make here")
    # Under `make test` these would make it talk of a make within a make.
    apart = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    finished = subprocess.run(
        [make, "help"], cwd=ROOT, capture_output=True, text=True, check=True, env=apart
    )
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    told = dict(line.split("\t") for line in finished.stdout.splitlines())
    assert set(told) == set(phony.split())
    assert all(text.strip() for text in told.values())


def test_the_environment_of_make_knows_the_program_in_any_folder(tmp_path, monkeypatch):
    rules = (ROOT / "Makefile").read_text()
    (code,) = re.findall(r'BIN\)/python -c "(.*)"$', rules, re.M)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sysconfig, "get_path", {"purelib": str(tmp_path)}.get)
    exec(code)
    monkeypatch.setattr(sys, "path", [])
    site.addsitedir(str(tmp_path))
    assert str(ROOT) in sys.path


VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def bare(tmp_path):
    """A PATH with an old Python alone, and an empty HOME."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "cat").symlink_to(shutil.which("cat"))
    old = bin_folder / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    return {"PATH": str(bin_folder), "HOME": str(tmp_path / "home")}


def find_python(env):
    return subprocess.run(
        [shutil.which("bash"), ROOT / "launch/setup/find_python.sh"],
        env=env,
        capture_output=True,
        text=True,
    )


def test_no_usable_python_is_said_with_what_to_do(bare):
    finished = find_python(bare)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("error: no Python of 3.13 3.12 3.11")
    for remedy in ("apt-get install", "pyenv install", "uv python", "PYTHON="):
        assert remedy in finished.stderr


def test_a_named_python_is_taken_or_refused_but_never_replaced(bare):
    finished = find_python(bare | {"PYTHON": "nonsense"})
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("error: PYTHON=nonsense")
    finished = find_python(bare | {"PYTHON": sys.executable})
    assert finished.stdout.strip() == sys.executable


@pytest.mark.parametrize(
    "inner",
    [
        f".pyenv/versions/{VERSION}.7/bin/python",
        f".local/share/uv/python/cpython-{VERSION}.7-linux-x86_64-gnu/bin/python3",
    ],
    ids=["pyenv", "uv"],
)
def test_an_interpreter_off_the_path_is_found(bare, inner):
    hidden = Path(bare["HOME"]) / inner
    hidden.parent.mkdir(parents=True)
    hidden.symlink_to(sys.executable)
    finished = find_python(bare)
    assert finished.stdout.strip() == str(hidden), finished.stderr
