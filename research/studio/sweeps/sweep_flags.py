"""The flags of `launch.sweep`: as the fields of a form, and checked before a start."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.config.field_names import written_list
from research.config.knobs import facts_of, flat
from research.config.knobs import fields as knob_fields
from research.config.run_config import Config
from research.core.errors import UserError, nearest
from research.studio.checks.config_presets import FOLDER as CONFIGS
from research.studio.jobs.pasted_words import flag_values, given_knobs
from research.studio.roots import shown_paths

DOOR = "launch.sweep"
# The flags that a form has; all others are for a shell.
OWN = ("sweep", "axis", "folder", "seeds", "together", "metric")
PATTERNS = {
    "seeds": re.compile(r"\d{1,9}(,\d{1,9})*"),
    "together": re.compile(r"[1-9]\d{0,2}"),
    "metric": re.compile(r"[^\x00-\x1f]+"),
}
CONFIG, CHANGES = "config", "changes"
KNOB = "--config."


def sweep_files() -> dict[str, str]:
    """The first line of each sweep file that comes with the code, by its path."""
    found = {}
    for file in sorted((CONFIGS / "sweeps").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        makes = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
        if "get_sweep" in makes:
            said = ast.get_docstring(tree) or ""
            found[shown_paths([file])[0]] = said.partition("\n")[0]
    return found


def fields_of(flags: Sequence[str]) -> dict[str, str]:
    """The text of each field for some flags.

    Raises:
      UserError: a word is no flag that the form has.
    """
    fields = dict.fromkeys((*OWN, CONFIG, CHANGES), "")
    middle = flags.index("--") if "--" in flags else len(flags)
    own, trainer = [*flags[:middle]], flags[middle + 1 :]
    for name, values in flag_values(own, ("axis",)).items():
        if name not in OWN:
            raise UserError(
                f"--{name} is no flag of the form, which has "
                f"{', '.join(f'--{x}' for x in OWN)} and, after --, --config and "
                "--config.KNOB=VALUE; start other sweeps in a shell"
            )
        fields[name] = "\n".join(values) if name == "axis" else values[0]
    changes = []
    for given in given_knobs(trainer):
        if given.name == CONFIG and not fields[CONFIG]:
            fields[CONFIG] = given.value or ""
        elif given.name.startswith(f"{CONFIG}.") and given.value is not None:
            changes.append(f"{given.name.removeprefix(f'{CONFIG}.')}={given.value}")
        else:
            raise UserError(f"{given.words[0]!r}: write --config.KNOB=VALUE after --")
    return fields | {CHANGES: "\n".join(changes)}


def flags_of(fields: Mapping[str, str]) -> list[str]:
    """The flags for the text of fields: a file, or else axes and a config."""
    has_file = bool(fields.get("sweep", "").strip())
    return all_flags({**fields, **({"axis": "", CONFIG: ""} if has_file else {})})


def all_flags(fields: Mapping[str, str]) -> list[str]:
    """A flag for each field that is filled, also where the command refuses both."""
    text = {name: fields.get(name, "").strip() for name in (*OWN, CONFIG, CHANGES)}
    flags = [f"--sweep={text['sweep']}"] if text["sweep"] else []
    axes = filter(None, map(str.strip, text["axis"].splitlines()))
    flags += [f"--axis={axis}" for axis in axes]
    for name in ("folder", "seeds", "together", "metric"):
        flags += [f"--{name}={text[name]}"] if text[name] else []
    config = [f"--config={text[CONFIG]}"] if text[CONFIG] else []
    changes = filter(None, map(str.strip, text[CHANGES].splitlines()))
    trainer = [*config, *(KNOB + change for change in changes)]
    return [*flags, "--", *trainer] if trainer else flags


def check_words(fields: Mapping[str, str]) -> None:
    """Checks everything but paths and configs.

    Raises:
      UserError: a field makes no sense to the command.
    """
    files, knobs = sweep_files(), flat(Config())
    if fields["sweep"] and fields["sweep"] not in files:
        raise UserError(
            f"--sweep={fields['sweep']}: a sweep file is a program, and the studio "
            f"takes {', '.join(files)}; start any other in a shell"
        )
    if not (fields["sweep"] or fields["axis"]):
        raise UserError("choose a sweep file, or write an axis, such as lora.rank=4,16")
    for name, pattern in PATTERNS.items():
        if fields[name] and not pattern.fullmatch(fields[name]):
            raise UserError(f"--{name}={fields[name]!r} is not as --help has it")
    for line in (*fields["axis"].splitlines(), *fields[CHANGES].splitlines()):
        knob, equals, _ = line.partition("=")
        if knob not in knobs or not equals:
            near = nearest(knob, knobs)
            raise UserError(f"{line!r}: write KNOB=VALUE; {knob!r} is no knob{near}")


def named_paths(fields: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The knobs that name paths in the axes and changes, with each of their values."""
    knobs = {path: field for path, field, _ in knob_fields(Config())}
    lines = [(line, ",") for line in fields["axis"].splitlines()]
    lines += [(line, None) for line in fields[CHANGES].splitlines()]
    for line, between in lines:
        knob, _, text = line.partition("=")
        if not facts_of(knobs[knob]).is_path:
            continue
        for value in text.split(between) if between else [text]:
            is_list = isinstance(flat(Config())[knob], tuple)
            yield knob, _listed(value, between) if is_list else value.strip()


def _listed(text: str, between: str | None) -> tuple[str, ...]:
    """A list of paths as an axis, where `+` joins them, or a flag has it."""
    if between:
        return tuple(text.strip().split("+"))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return written_list("text.sources", text)
    return tuple(map(str, value)) if isinstance(value, tuple | list) else (str(value),)


def new_folder(fields: Mapping[str, str], root: Path) -> Path:
    """The folder of a sweep that has none: its file's, or a new one of its knobs."""
    if fields["sweep"]:
        return root / "sweeps" / Path(fields["sweep"]).stem
    knobs = [line.partition("=")[0] for line in fields["axis"].splitlines()]
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(knobs)) or "sweep"
    path, number = root / "sweeps" / plain, 1
    while path.exists():
        number += 1
        path = root / "sweeps" / f"{plain}-{number}"
    return path
