"""How people write knobs and flags: mistyped, or with the names of other tools.

`field_names.toml` says what a name of another tool is called here. It is explained,
never accepted: many of them count something else than ours do.
"""

import ast
import functools
import shlex
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from research.core.errors import closest, nearest

FILE = Path(__file__).with_name("field_names.toml")
LIKELY = 0.75  # More than elsewhere: of 400 names, one is always a little alike.
HERE = "here"
# Where a command without knobs sends who types one.
ELSEWHERE = "in research.train, and is no flag here"
# Their value is a list, which other trainers write with commas.
LISTS = ("lora.targets",)


def flag(knob: str, value: Any) -> str:
    """A knob as the command line writes it."""
    return f"--config.{knob}={tuple(value) if isinstance(value, list) else value}"


def shell_flag(knob: str, value: Any) -> str:
    """A knob for a shell, in double quotes where that can be."""
    name, _, text = flag(knob, value).partition("=")
    if shlex.quote(text) in (text, "''"):
        return f"{name}={text}"
    special = set(text) & set('"$`!\\')
    return shlex.quote(f"{name}={text}") if special else f'{name}="{text}"'


def explain_flag(
    written: str,
    flags: Collection[str],
    knobs: Collection[str],
    value: str | None = None,
    where: str = HERE,
) -> str:
    """The rest of a sentence about the name `written`, which is no flag of a command.

    Args:
      written: without the dashes in front.
      flags: those of the command.
      knobs: all paths of the config.
      value: the one that was given; it is repeated where it means the same here.
      where: to set a knob.
    """
    word = _plain(written)
    own = {_plain(flag): flag for flag in flags}
    known = {name: how for name, how in flags_of_others().get(word, {}).items() if name}
    if flag := next((own[name] for name in (word, *known) if name in own), ""):
        how = known.get(_plain(flag), "")
        given = "" if value is None or how else f"={shlex.quote(value)}"
        return f" is called --{flag}{given} here{how and ': '}{how}"
    absent = flags_of_others().get(word, {}).get("", "")
    if absent and where == ELSEWHERE:
        return f" does not exist here: {absent}"
    path = word.removeprefix("config.")
    if path == word and (near := nearest(written, flags)):
        return near if where == HERE else f" is not a flag{near}"
    said = explain(path, knobs, value, where)
    unknown = said in (" is not a knob", " is not a flag")
    return f" does not exist here: {absent}" if absent and unknown else said


def explain(
    written: str,
    knobs: Collection[str],
    value: str | None = None,
    where: str = HERE,
) -> str:
    """The rest of a sentence about the name `written`, which is no knob.

    Args:
      written: such as `lr`, `learning-rate` or `optim.lr`.
      knobs: the paths that are known.
      value: the one that was given; it is repeated where it means the same here.
      where: to set the knob.
    """
    path = _plain(written)
    group, _, word = path.rpartition(".")
    table = names_of_others()
    by_last: dict[str, list[str]] = {}
    for knob in knobs:
        by_last.setdefault(knob.rpartition(".")[2], []).append(knob)
    # A group shows that one of our own knobs was meant.
    if word in table and not (group and word in by_last):
        return _said(*table[word], value, where)
    if same := by_last.get(word):
        likely = closest(path, same) if group else ""
        flags = [_flag(knob, value) for knob in ([likely] if likely else same)]
        return f" is called {' or '.join(flags)} {where}"
    if where != HERE:
        return " is not a flag"
    guess = closest(word, [*by_last, *table], LIKELY)
    if guess in by_last:
        paths = " or ".join(map(repr, by_last[guess]))
        return f" is not a knob (did you mean {paths}?)"
    if guess:
        return f" is not a knob (did you mean {guess!r}? It{_said(*table[guess])})"
    return " is not a knob"


def _said(knob: str, how: str, value: str | None = None, where: str = HERE) -> str:
    if not knob:
        return f" does not exist here: {how}"
    flag = _flag(knob, None if how else value)
    return f" is called {flag} {where}{how and ': '}{how}"


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


def _flag(knob: str, value: str | None) -> str:
    if value is None:
        return f"config.{knob}"
    return shell_flag(knob, _as_list(value) if knob in LISTS else value)


def _as_list(value: str) -> Any:
    """`a,b` as a list; what Python would read as one stays as it is."""
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value.replace(",", " ").split()
    return value


@functools.cache
def names_of_others() -> Mapping[str, tuple[str, str]]:
    """`name: (knob, explanation)`; the knob is empty where there is none.

    Where the explanation is empty, the value means the same.
    """
    written = _table()
    found: dict[str, tuple[str, str]] = {}
    for knob, names in written["same"].items():
        found |= dict.fromkeys(names.split(), (knob, ""))
    for names, (knob, how) in written["converted"].items():
        found |= dict.fromkeys(names.split(), (knob, how))
    for names, how in written["absent"].items():
        found |= dict.fromkeys(names.split(), ("", how))
    return found


@functools.cache
def flags_of_others() -> Mapping[str, Mapping[str, str]]:
    """`name: {flag: explanation}`, for flags of commands that are no trainers.

    The first flag that a command has counts. An empty explanation says that the value
    means the same; an empty flag stands for a command with none of the others.
    """
    written = _table()["flags"]
    found: dict[str, dict[str, str]] = {}
    for flag, names in written["same"].items():
        for name in names.split():
            found.setdefault(name, {})[flag] = ""
    for names, flags in written["converted"].items():
        for name in names.split():
            found.setdefault(name, {}).update(flags)
    for names, how in written["absent"].items():
        for name in names.split():
            found.setdefault(name, {})[""] = how
    return found


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
