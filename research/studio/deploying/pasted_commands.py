"""A pasted command of a server, an export or an alias as the fields of its form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.studio.deploying.exports import name_of_choice
from research.studio.jobs.pasted_words import (
    flag_values,
    lacking,
    read_pasted,
    without,
)
from research.studio.roots import Roots

SERVE, EXPORT, ALIASES = "research.serve", "research.export", "research.runs.aliases"
# Flags of each command that its form has; those of the second list follow from others.
FLAGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    SERVE: (
        ("run", "port", "slots", "adapters", "weights", "api_key_file"),
        ("adapters_from",),
    ),
    EXPORT: (("run", "step", "format", "dtype", "quant"), ("out",)),
    ALIASES: (("alias", "run", "back"), ()),
}
LISTS = {SERVE: ("run",), EXPORT: (), ALIASES: ()}  # Flags with several values.
SET_BY_FORMS = ("out", "adapters_from", "api_key_file")
RESOLVED = ("run", "step", "alias", "back")  # A form may write another value.
FORMAT_FLAGS = ("format", "dtype", "quant")


def fields_of_command(text: str, runs: Roots) -> dict[str, Any]:
    """The fields of the Deploy page: `do`, `run`, and those of its form.

    Raises:
      UserError: it is none of these commands, or a flag is for a shell.
      PageError: a run lies outside of the roots.
    """
    found = read_pasted(text, *FLAGS)
    door = found.door
    if not door:
        raise UserError(f"paste a command of {', '.join(FLAGS)}")
    known, implied = FLAGS[door]
    given = flag_values(found.words, LISTS[door])
    for name in given:
        if name not in (*known, *implied):
            shown = ", ".join(f"--{x}" for x in known)
            raise UserError(
                f"--{name[:40]} is no flag of the form, which has {shown}; run that "
                "command in a shell"
            )
    chosen = [_named(x, runs) for x in given.pop("run", [])]
    last = {name: values[0] for name, values in given.items() if name in known}
    if door == SERVE:
        keys = Path(last.pop("api_key_file", ""))  # In the folder of the server.
        name = {"name": keys.parent.name} if keys.parent.name else {}
        return {"do": "serve", "run": chosen, **name, **last}
    if door == EXPORT:
        numbers = {x: last.pop(x) for x in FORMAT_FLAGS if x in last}
        made = name_of_choice(**numbers)
        return {"do": "export", "run": chosen, "format": made, **last}
    alias = {"alias": _named(last.get("alias", ""), runs)}
    back = last.get("back", "False")
    if back in ("", "True"):
        return {"do": "back", **alias}
    if back != "False":
        raise UserError(f"--back {back}: --back takes no value")
    run, step = split_step(chosen[0] if chosen else "")
    return {"do": "promote", "run": [run], "step": step, **alias}


def lost(text: str, made: Sequence[str], names: Sequence[str] = SET_BY_FORMS) -> str:
    """A sentence about flags that a form sets itself, and not as a pasted command.

    Args:
      text: the pasted command.
      made: the command that the form makes of it; empty if it makes none, and then only
        the flags of `names` are compared.
      names: of the flags that no field is for.
    """
    found = read_pasted(text, *FLAGS)
    given = [
        f"--{name}={value}"
        for name, values in flag_values(found.words, LISTS[found.door]).items()
        for value in values
        if name in names or (made and name not in RESOLVED)
    ]
    return without([*found.before, *lacking(given, made)])


def _named(written: str, runs: Roots) -> str:
    """`runs/a@3` as pages name it."""
    place, step = split_step(written)
    return runs.name(Path(place).expanduser()) + (f"@{step}" if step else "")
