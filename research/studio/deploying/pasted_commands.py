"""A pasted command of a server, an export or an alias as the fields of its form."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.studio.deploying.exports import HUGGING_FACE, known_formats
from research.studio.jobs.job_commands import flag_values, without, words_of
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
SET_BY_FORMS = ("out", "adapters_from", "api_key_file")


def fields_of_command(text: str, runs: Roots) -> dict[str, Any]:
    """The fields of the Deploy page: `do`, `run`, and those of its form.

    Raises:
      UserError: it is none of these commands, or a flag is for a shell.
      PageError: a run lies outside of the roots.
    """
    words = words_of(text)
    door = next((x for x in FLAGS if x in words), None)
    if door is None:
        raise UserError(f"paste a command of {', '.join(FLAGS)}")
    known, implied = FLAGS[door]
    given: dict[str, list[str]] = {}
    for name, value in flag_values(words[words.index(door) + 1 :]):
        if name not in (*known, *implied):
            shown = ", ".join(f"--{x}" for x in known)
            raise UserError(
                f"--{name[:40]} is no flag of the form, which has {shown}; run that "
                "command in a shell"
            )
        given.setdefault(name, []).append(value)
    chosen = [_named(x, runs) for x in given.pop("run", [])]
    last = {name: values[-1] for name, values in given.items() if name in known}
    if door == SERVE:
        keys = Path(last.pop("api_key_file", ""))  # In the folder of the server.
        name = {"name": keys.parent.name} if keys.parent.name else {}
        return {"do": "serve", "run": chosen, **name, **last}
    if door == EXPORT:
        numbers = ("format", "dtype", "quant")
        flags = tuple(f"--{x}={last.pop(x)}" for x in numbers if x in last)
        flags = flags or HUGGING_FACE[0].flags
        names = [x.name for x in known_formats() if x.flags == flags]
        format = [*names, " ".join(flags)][0]
        return {"do": "export", "run": chosen, "format": format, **last}
    alias = {"alias": _named(last.get("alias", ""), runs)}
    if last.get("back", "False") in ("", "True"):
        return {"do": "back", **alias}
    run, step = split_step(chosen[0] if chosen else "")
    return {"do": "promote", "run": [run], "step": step, **alias}


def lost(text: str, made: Sequence[str], names: Sequence[str] = SET_BY_FORMS) -> str:
    """A sentence about flags that a form sets itself, and not as a pasted command.

    Args:
      text: the pasted command.
      made: the command that the form makes of it; empty if it makes none.
      names: of the flags that are compared, whose values are paths or numbers.
    """
    words = words_of(text)
    door = next(x for x in FLAGS if x in words)
    own = dict(flag_values(made[made.index(door) + 1 :])) if made else {}
    return without(
        [
            f"--{name}={value}"
            for name, value in flag_values(words[words.index(door) + 1 :])
            if name in names and (name not in own or _whole(own[name]) != _whole(value))
        ]
    )


def _whole(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _named(written: str, runs: Roots) -> str:
    """`runs/a@3` as pages name it."""
    place, step = split_step(written)
    return runs.name(Path(place).expanduser()) + (f"@{step}" if step else "")
