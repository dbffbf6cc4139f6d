"""A wheel has every file that the commands need, and they run from it anywhere."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from source_files import LAUNCHER, PACKAGE, ROOT

PACKAGES = (PACKAGE, LAUNCHER)
BUILD = (
    "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
)
ALL_HELP = """
import contextlib, importlib, io, sys
import research, launch
for package in research, launch:
    assert package.__file__.startswith(sys.argv[1]), package.__file__
for door in sys.argv[2:]:
    main, said = importlib.import_module(f"{door}.__main__").main, io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            main([door, "--help"])
        except SystemExit as ended:
            assert not ended.code, (door, ended.code)
    assert f"python -m {door}" in said.getvalue(), door
print("all")
"""


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(
            package,
            folder / "source" / package.name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    run("-c", BUILD, folder / "built", cwd=folder / "source")
    (built,) = (folder / "built").glob("*.whl")
    return built


def test_the_wheel_has_every_file_and_nothing_else(wheel):
    expected = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    found = set(zipfile.ZipFile(wheel).namelist())
    assert {x for x in found if ".dist-info/" not in x} == expected
    assert any(not name.endswith(".py") for name in expected)


def test_every_command_runs_from_an_installed_wheel(wheel, tmp_path):
    installed = tmp_path / "installed"
    run(
        "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-index", "--no-deps", "--target", installed, wheel,
    )  # fmt: skip
    doors = sorted(
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for file in package.rglob("__main__.py")
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P keeps the working directory and the repository off the path.
    program = ("-P", "-c", ALL_HELP, installed, *doors)
    said = run(*program, cwd=elsewhere, env={"PYTHONPATH": str(installed)})
    assert said.splitlines()[-1] == "all"
