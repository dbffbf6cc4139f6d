"""Reads commands that people paste, and finds what the command of a form lacks."""

import dataclasses
import os
import re
import shlex
from collections.abc import Collection, Iterator, Sequence

from research.config.command_line import NoFlags
from research.config.field_names import GivenFlag, given_flags
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError

NEXT_FLAG = re.compile(r"--|-[^.\d]")
PYTHON = re.compile(r"(.*/)?python[\d.]*|-m")
TRAIN, LAUNCH = "research.train", "launch"
PLAN, CHECKS = "research.plan", "research.studio.checks"
HERE = "local"  # The target of a launch on this machine.
# The modules that pages show commands of, and where each has its form or button.
DOORS = {
    **dict.fromkeys((TRAIN, LAUNCH, PLAN), "on the Train page"),
    CHECKS: "on the Train page, or with --rows_only on the Data page",
    "research.evaluate": "on the Evaluate page",
    "launch.sweep": "on the Sweeps page",
    **dict.fromkeys(
        ("research.serve", "research.export", "research.runs.aliases"),
        "on the Deploy page",
    ),
    "research.runs": "as a button on the page of its run",
    "launch.report": "as a button on the page of its sweep",
}


@dataclasses.dataclass(frozen=True)
class PastedCommand:
    """A command, or flags alone.

    Attributes:
      door: the module that it runs; empty for flags alone.
      words: behind it.
      before: what stands before `python -m`, such as NAME=VALUE; no form has it.
    """

    door: str
    words: list[str]
    before: list[str]


@dataclasses.dataclass(frozen=True)
class PastedStart:
    """A command that takes the flags of a training: it trains, plans or checks it.

    Attributes:
      door: see `PastedCommand`.
      flags: those of the training.
      own: those of the command itself, each as `--NAME=VALUE` or `--NAME`.
      target: of a launch; empty for other commands.
      before: see `PastedCommand`.
    """

    door: str
    flags: list[str]
    own: list[str]
    target: str
    before: list[str]

    def dropped(self, made: Sequence[str]) -> list[str]:
        """All but the flags of the training that the command `made` lacks."""
        is_elsewhere = self.target not in ("", HERE) and self.target not in made
        where = [f"{LAUNCH} {self.target}"] if is_elsewhere else []
        return [*self.before, *where, *lacking(self.own, made)]


def words_of(text: str) -> list[str]:
    """A command as a shell reads it. Raises UserError."""
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise UserError(f"this is no command: {error}") from error


def read_pasted(text: str, *doors: str) -> PastedCommand:
    """A command of one of `doors`, or flags alone.

    Raises:
      UserError: it is another command, or none.
    """
    words = words_of(text)
    modules = (i for i, x in enumerate(words) if x in DOORS and words[i - 1] == "-m")
    at = next(modules, 0)
    if not at and words and words[0] not in DOORS:
        if not words[0].startswith("-"):
            raise UserError(
                f"paste a command of {', '.join(doors)}, or its flags alone"
            )
        return PastedCommand("", words, [])
    if not words:
        return PastedCommand("", [], [])
    door = words[at]
    if door not in doors:
        raise UserError(
            f"a command of {door} has its place {DOORS[door]}; this form takes those "
            f"of {', '.join(doors)}"
        )
    before = [x for x in words[:at] if not PYTHON.fullmatch(x)]
    return PastedCommand(door, words[at + 1 :], before)


def read_start(text: str) -> PastedStart:
    """A command with the flags of a training.

    Raises:
      UserError: it is another command, or has a word that is no flag.
    """
    found = read_pasted(text, TRAIN, LAUNCH, PLAN, CHECKS)
    words, own, target = found.words, [], ""
    if found.door == LAUNCH:
        if "--" not in words:
            raise UserError("a launch has the flags of the training behind --")
        middle = words.index("--")
        target, *left = words[:middle] or [""]
        own = [f"--{name}={value}".removesuffix("=") for name, value in _pairs(left)]
        words = words[middle + 1 :]
    flags = []
    for given in given_knobs(words):
        if given.name == "config" or given.name.startswith("config."):
            flags += given.words
        elif given.name and found.door in (PLAN, CHECKS):
            own.append("=".join(given.words))
        else:
            raise UserError(
                f"{given.words[0]!r} is no knob of a training: paste a command of "
                f"{TRAIN}, or its flags alone"
            )
    return PastedStart(found.door, flags, own, target, found.before)


def given_knobs(words: Sequence[str]) -> Iterator[GivenFlag]:
    """The flags of a training, among which those of another command may stand."""
    return given_flags(words, NoFlags, flat(Config()))


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each flag; the value may be a word of its own, or absent.

    Raises:
      UserError: a word is no flag.
    """
    left = [*reversed(words)]
    while left:
        word = left.pop()
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise UserError(f"{word[:80]!r} is no flag: write --NAME=VALUE")
        if not equals and left and not NEXT_FLAG.match(left[-1]):
            value = left.pop()
        yield name, value


def flag_values(
    words: Sequence[str], lists: Collection[str] = ()
) -> dict[str, list[str]]:
    """The values of each flag by its name; `lists` are flags that take several.

    Raises:
      UserError: a word is no flag, or a flag has one value too many.
    """
    found: dict[str, list[str]] = {}
    for name, value in _pairs(words):
        found.setdefault(name, []).append(value)
    for name, values in found.items():
        if name not in lists and len({*values}) > 1:
            raise UserError(
                f"--{name} is given several times, as {' and '.join(values)}: keep one "
                "of them"
            )
    return found


def lacking(given: Sequence[str], made: Sequence[str]) -> list[str]:
    """Those of the flags `given` that the command `made` has not, or otherwise.

    Each is one word. Values that are paths may be written in several ways.
    """
    known = {_plain(word) for word in made}
    return [word for word in given if _plain(word) not in known]


def _plain(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, os.path.abspath(os.path.expanduser(value))


def without(words: Sequence[str]) -> str:
    """A sentence about words of a pasted command that a form has no field for."""
    if not words:
        return ""
    them = "it" if len(words) == 1 else "them"
    return (
        f"this form has no place for {', '.join(words)}: the command that it makes is "
        f"without {them}"
    )
