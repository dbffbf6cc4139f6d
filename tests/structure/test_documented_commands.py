"""README.md and docs/ name commands, knobs and paths that work.

`make test` parses each command as its module does, and checks each config that this
makes. `make soak` runs the commands of the tutorial in order.
"""

import ast
import contextlib
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from source_files import ROOT

from launch.jobs import launcher
from launch.sweep import run_packs
from research.config import command_line
from research.config.knobs import flat
from research.config.run_config import Config
from research.config.saved_config import to_json
from research.core import stop_signals

TUTORIAL = ROOT / "docs" / "tutorial.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# An indented line that begins with variables or none, and then a program.
COMMAND = re.compile(
    r"^    ((?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?python|make) (?:.*\\\n)*.*)$", re.M
)
FILE = re.compile(r"^`([\w./]+)`:\n\n```\w*\n(.*?)^```$", re.M | re.S)
KNOB = re.compile(r"--config\.([a-z]\w*(?:\.\w+)*)")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
TOP = r"(?:research|launch|tests|docs|configs)"
PATH = re.compile(rf"{TOP}/[\w./*-]*|\w+(?:/\w+)+\.(?:py|md|toml|json|png)")
LINK = re.compile(r"\]\(([^)#:]+)[^):]*\)")


@dataclasses.dataclass
class Command:
    """A command of a document.

    Attributes:
      text: as it is written.
      words: without variables and comment.
      shown: the output below it.
    """

    text: str
    words: list[str]
    shown: str

    @property
    def module(self):
        return self.words[2] if self.words[1:2] == ["-m"] else ""


def commands(document):
    found = [*COMMAND.finditer(document)]
    ends = [match.start() for match in found[1:]] + [len(document)]
    for match, end in zip(found, ends, strict=False):
        words = shlex.split(match[1].replace("\\\n", " "), comments=True)
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        yield Command(match[1], words, document[match.end() : end])


def write_files(document, folder):
    """Writes the files whose text stands in the document."""
    for name, text in FILE.findall(document):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


class ParsedError(Exception):
    """The module has read its whole command line."""


def stop(*args, **kwargs):
    raise ParsedError


@contextlib.contextmanager
def only_parsed():
    """Ends each door where it has read its flags; a run leaves its config."""
    depth = 0

    def wrap(parse):
        def parsing(*args):
            nonlocal depth
            depth += 1
            try:
                found = parse(*args)
            finally:
                depth -= 1
            if depth:
                return found
            if parse.__name__ == "parse_with_config":
                folder = Path(found[0].run_dir)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.json").write_text(to_json(found[0]))
            raise ParsedError

        return parsing

    names = ("parse", "parse_with_config", "parse_with_changes")
    with contextlib.ExitStack() as stack:
        for name in names:
            wrapped = wrap(getattr(command_line, name))
            stack.enter_context(mock.patch.object(command_line, name, wrapped))
        for module, name in (
            (launcher, "start"),
            (run_packs, "make_packs"),
            (importlib.import_module("launch.report.__main__"), "find"),
            (stop_signals, "resume_after_signals"),
        ):
            end = stop if name != "resume_after_signals" else lambda: None
            stack.enter_context(mock.patch.object(module, name, end))
        yield


def parse(command, folder):
    """Raises where the command cannot be meant: an unknown flag, knob, value, file."""
    program, *rest = command.words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= {*targets}
    elif not command.module:
        assert (folder / rest[0]).is_file()
    else:
        main = importlib.import_module(f"{command.module}.__main__").main
        argv = [command.module, *command.words[3:]]
        if "--help" in " ".join(argv):
            with pytest.raises(SystemExit) as ended:
                main(argv)
            assert not ended.value.code
            return
        with only_parsed(), pytest.raises(ParsedError):
            main(argv)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader types: a folder with the config files."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_sweep.py").symlink_to(ROOT / "configs" / "sweeps" / "lora_rank.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_command_of_a_document_is_read_as_its_module_does(path, folder):
    document = path.read_text()
    write_files(document, folder)
    for command in commands(document):
        parse(command, folder)


def test_commands_are_found_and_wrong_ones_are_refused(folder):
    found = [*commands((ROOT / "README.md").read_text())]
    assert {"research.train", "launch", "launch.sweep", "research.evaluate"} <= {
        command.module for command in found
    }
    config = "--config=configs/finetune_dolly.py"
    for wrong in (
        "make coffee",
        "python nowhere.py",
        f"python -m research.train {config} --config.lora.rnak=4",
        f"python -m research.train {config} \\\n        --config.steps=-7",
        f"A=b .venv/bin/python -m research.plan {config} --chip=h100",
        "python -m research.train --config=absent",
        "python -m research.generate --run=a --promt=b",
        f"python -m launch slurm --gpu=8 -- {config}",
        "python -m launch.sweep --sweep=my_sweep.py -- --config.rank=1",
    ):
        [command] = commands(f"Text:\n\n    {wrong}\n")
        with pytest.raises((Exception, SystemExit)):
            parse(command, folder)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_knob_and_path_that_a_document_names_is_there(path):
    document = path.read_text()
    knobs = flat(Config())
    for name in KNOB.findall(document):
        assert any(f"{knob}.".startswith(f"{name.rstrip('.')}.") for knob in knobs), (
            name
        )
    made = {name for name, _ in FILE.findall(document)}
    for code in INLINE.findall(document):
        if PATH.fullmatch(code) and code not in made:
            assert [*ROOT.glob(code.rstrip("/"))], f"{path.name} names {code}"
    for link in LINK.findall(document):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"
    for code in PYTHON.findall(document):
        ast.parse(code)


@pytest.mark.soak
def test_the_commands_of_the_tutorial_do_what_it_shows(tmp_path):
    """Those that show an error fail; all others work, each after the one before."""
    document = TUTORIAL.read_text()
    write_files(document, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    # As a reader's shell has it: the settings of JAX are those of these tests.
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ran = [*commands(document)]
    assert len(ran) > 8
    for command in ran:
        done = subprocess.run(
            command.text, shell=True, cwd=tmp_path, env=env, text=True,
            capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stdout + done.stderr
        fails = re.search(r"^    error: (.*)", command.shown, re.M)
        assert bool(done.returncode) == bool(fails), f"{command.text}\n{said[-3000:]}"
        if fails:
            assert fails[1][:40] in said
