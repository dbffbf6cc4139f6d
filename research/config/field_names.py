"""How people write knobs and flags: mistyped, or with the names of other tools.

`field_names.toml` says what a name of another tool is called here. It is explained,
never accepted: many of them count something else than ours do.
"""

import dataclasses
import functools
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.core.errors import closest, nearest
from research.core.hub_access import is_hub
from research.core.local_paths import local_path

FILE = Path(__file__).with_name("field_names.toml")
LIKELY = 0.75  # More than elsewhere: of 400 names, one is always a little alike.
HERE = "here"
# Where a command without knobs sends who types one.
ELSEWHERE = "in research.train, and is no flag here"
ABSL_FLAGS = {"flagfile", "undefok"}
# A name as other trainers write it, and no path of a file.
SETTING = re.compile(r"[A-Za-z_][\w.-]*")
# A source of raw text, before its `=where`.
SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
NEGATIVE = re.compile(r"-\.?\d")  # A number, for no flag begins like that.
# The words of absl, which the core does without.
SWITCHES = dict.fromkeys(("true", "t", "1"), True) | dict.fromkeys(
    ("false", "f", "0"), False
)
# How text is read for a knob of a type, so that equal values are known as equal.
READERS: Mapping[Any, Callable[[str], Any]] = {
    bool: lambda text: SWITCHES[text.lower()],
    int: int,
    float: float,
    Path: os.path.normpath,
}
# Their value is a list, which other trainers write with commas.
LISTS = ("lora.targets", "lora.full", "text.sources", "eval.text_prompts")


class GivenFlag(NamedTuple):
    """A word of a command line, with the value that may follow it.

    Attributes:
      name: without dashes; `quick` of `--noquick`; empty if the word is no flag.
      value: as it is written; True or False of a switch without one; else None.
      words: the one or two words.
      is_known: whether it is a flag or a knob, or a word that may stand alone.
    """

    name: str
    value: str | None
    words: tuple[str, ...]
    is_known: bool


def given_flags(
    arguments: Sequence[str], options: type, knobs: Mapping[str, Any]
) -> Iterator[GivenFlag]:
    """Splits the arguments behind a command's name.

    Args:
      arguments: as the shell gives them.
      options: the group of the command's own flags.
      knobs: all knobs by path, with any value of their type; empty for a command that
        takes none.
    """
    own = {field.name for field in dataclasses.fields(options)} - {"verb"} | ABSL_FLAGS
    if knobs:
        own.add("config")
    words = [*reversed(arguments)]
    while words:
        word = words.pop()
        if word == "--":  # None of the words behind it is a flag.
            yield from (GivenFlag("", None, (w,), True) for w in (word, *words[::-1]))
            return
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not name:
            # Some trainers have names and values without dashes.
            is_setting = bool(equals and SETTING.fullmatch(name))
            yield GivenFlag("", None, (word,), not is_setting)
            continue
        path = name.removeprefix("config.")
        is_known = name in own or (path != name and path in knobs)
        is_switch = type(knobs.get(path)) is bool or _is_switch(options, name)
        if equals:
            yield GivenFlag(name, value, (word,), is_known)
        elif is_known and is_switch:
            yield GivenFlag(name, "True", (word,), True)
        elif not is_known and _is_negated(name, options, knobs):
            yield GivenFlag(name.removeprefix("no"), "False", (word,), True)
        elif words and (
            is_known or not words[-1].startswith("-") or NEGATIVE.match(words[-1])
        ):
            # The value of a known flag may begin with a dash.
            value = words.pop()
            yield GivenFlag(name, value, (word, value), is_known)
        else:
            yield GivenFlag(name, None, (word,), is_known)


def repeats(given: Iterable[GivenFlag], types: Mapping[str, Any]) -> list[str]:
    """A line for each flag that has several values, of which only one could count.

    `types` are those of flags by name, `Path` for a path; a tuple takes all values.
    """
    values: dict[str, dict[Any, str | None]] = {}
    for flag in given:
        kind = types.get(flag.name)
        is_list = typing.get_origin(kind) is tuple
        if flag.name and not is_list and flag.name not in ABSL_FLAGS:
            found = values.setdefault(flag.name, {})
            found.setdefault(_meaning(flag.value, kind), flag.value)
    return [
        f"--{name} is given several times, as {' and '.join(map(repr, x.values()))}: "
        "keep one of them"
        for name, x in values.items()
        if len(x) > 1
    ]


def _meaning(value: str | None, kind: Any) -> Any:
    """The value as its knob has it; the text where that cannot be read."""
    try:
        return READERS[kind](value or "")
    except (KeyError, ValueError):
        return value


def _is_switch(options: type, name: str) -> bool:
    return typing.get_type_hints(options).get(name) is bool


def _is_negated(name: str, options: type, knobs: Mapping[str, Any]) -> bool:
    """Whether this is `noquick` or `noconfig.export`, which sets a switch to False."""
    path = name.removeprefix("no").removeprefix("config.")
    ours = name.startswith("noconfig.") and type(knobs.get(path)) is bool
    return ours or (name.startswith("no") and _is_switch(options, name[2:]))


def name_sources(written: str) -> tuple[str, ...]:
    """`name=where` for each of some places between commas, as `sources` has them.

    A place without a name gets that of its file. Text that has the name of a file or
    folder is one place.
    """
    parts = [part.strip() for part in written.split(",")]
    if not is_hub(written) and local_path(written).exists():
        parts = [written]
    named: list[str] = []
    for part in parts:
        name, equals, _ = part.partition("=")
        if not equals or not SOURCE_NAME.fullmatch(name) or os.path.exists(part):
            stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(part).name.partition(".")[0])
            part = f"{stem.lstrip('.-') or 'text'}={part}"
        named.append(part)
    return tuple(named)


def written_list(knob: str, text: str) -> tuple[str, ...]:
    """The list that `text` probably means, for a knob that is a list of texts."""
    if knob == "text.sources":
        whole = os.path.exists(text)
        parts = [text] if whole else map(_source, text.strip("()[] ").split(","))
        return name_sources(",".join(parts))
    if knob in ("lora.targets", "lora.full"):
        text = ",".join(text.split())
    parts = [text] if knob == "eval.text_prompts" else text.split(",")
    return tuple(filter(None, (part.strip("()[]'\" ") for part in parts)))


def _source(part: str) -> str:
    """The place alone where the name before it cannot be one."""
    name, equals, where = part.strip("'\" ").partition("=")
    is_source = equals and where and SOURCE_NAME.fullmatch(name)
    return f"{name}={where}" if is_source else where or name or "PLACE"


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
    path = word.removeprefix("config.")
    # A knob that a command has a flag for; other paths are not those of flags.
    named = flags_of_others().get(path if "." in path else word, {})
    known = {name: how for name, how in named.items() if name}
    if flag := next((own[name] for name in (word, *known) if name in own), ""):
        how = known.get(_plain(flag), "")
        given = "" if value is None or how else f"={shlex.quote(value)}"
        return f" is called --{flag}{given} here{how and ': '}{how}"
    absent = named.get("", "")
    if absent and where == ELSEWHERE:
        return f" does not exist here: {absent}"
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
    # A group shows that one of our own knobs was meant, and first one of that group.
    start = f"{group}."
    inside = {k.removeprefix(start): k for k in knobs if group and k.startswith(start)}
    of_others = table.get(word, ("", ""))
    near = "" if path in knobs else closest(word, inside, LIKELY)
    if near and of_others[0] not in inside.values():
        likely = [inside[near], *by_last.get(word, [])]
        flags = [repr(k) if value is None else _flag(k, value) for k in likely]
        meant = f" is not a knob (did you mean {' or '.join(flags)}?)"
        return meant if where == HERE else " is not a flag"
    if word in table and not (group and word in by_last):
        return _said(*of_others, value, where)
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
    return shell_flag(knob, written_list(knob, value) if knob in LISTS else value)


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
