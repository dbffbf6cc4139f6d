"""How people write knobs: flags, mistyped names, and the names of other trainers.

`field_names.toml` says what a name of another trainer is called here. It is explained,
never accepted: many of them count something else than ours do.
"""

import ast
import functools
import shlex
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from research.core.errors import closest

FILE = Path(__file__).with_name("field_names.toml")
LIKELY = 0.75  # More than elsewhere: of 400 names, one is always a little alike.
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


def explain(written: str, knobs: Collection[str], value: str | None = None) -> str:
    """The rest of a sentence about the name `written`, which is no knob.

    Args:
      written: such as `lr`, `learning-rate` or `optim.lr`.
      knobs: the paths that are known.
      value: the one that was given; it is repeated where it means the same here.
    """
    path = written.replace("-", "_").lower()
    group, _, word = path.rpartition(".")
    table = names_of_others()
    by_last: dict[str, list[str]] = {}
    for knob in knobs:
        by_last.setdefault(knob.rpartition(".")[2], []).append(knob)
    # A group shows that one of our own knobs was meant.
    if word in table and not (group and word in by_last):
        return _said(*table[word], value)
    if same := by_last.get(word):
        likely = closest(path, same) if group else ""
        flags = [_flag(knob, value) for knob in ([likely] if likely else same)]
        return f" is called {' or '.join(flags)} here"
    guess = closest(word, [*by_last, *table], LIKELY)
    if guess in by_last:
        paths = " or ".join(map(repr, by_last[guess]))
        return f" is not a knob (did you mean {paths}?)"
    if guess:
        return f" is not a knob (did you mean {guess!r}? It{_said(*table[guess])})"
    return " is not a knob"


def _said(knob: str, how: str, value: str | None = None) -> str:
    if not knob:
        return f" does not exist here: {how}"
    return f" is called {_flag(knob, None if how else value)} here{how and ': '}{how}"


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
    written = tomllib.loads(FILE.read_text(encoding="utf-8"))
    found: dict[str, tuple[str, str]] = {}
    for knob, names in written["same"].items():
        found |= dict.fromkeys(names.split(), (knob, ""))
    for names, (knob, how) in written["converted"].items():
        found |= dict.fromkeys(names.split(), (knob, how))
    for names, how in written["absent"].items():
        found |= dict.fromkeys(names.split(), ("", how))
    return found
