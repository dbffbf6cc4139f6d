"""The flags of an evaluation: as the fields of a form, and checked before a start."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.config.field_names import flag, given_flags
from research.config.knobs import facts_of, flat
from research.config.knobs import fields as knob_fields
from research.config.run_config import Config
from research.core.errors import UserError
from research.evaluate.evaluate_flags import OF_FILES, EvaluateFlags, read_flags
from research.studio.confinement import Confinement

DOOR = "research.evaluate"
BASE = "base"  # Stands for the base model of the first run in `--against`.
KNOB = "config."
OWN = {field.name: field for field in dataclasses.fields(EvaluateFlags)}
# Between the values of a flag that takes several, in a field of the form.
BETWEEN = {"metrics": ","}
LINES = "\n"


def file_knobs() -> list[str]:
    """The knobs that say how files are read; an evaluation may change no others."""
    return [
        path
        for path in flat(Config())
        if any(f"{path}.".startswith(f"{group}.") for group in OF_FILES)
    ]


def default_text(name: str) -> str:
    """The value of a flag that is not given, as its field shows it."""
    value = OWN[name].default
    if isinstance(value, tuple):
        return BETWEEN.get(name, LINES).join(value)
    return str(value)


def fields_of(flags: Sequence[str]) -> dict[str, str]:
    """The text of each field for some flags; knobs are `config.NAME`.

    Raises:
      UserError: a word is no flag of an evaluation.
    """
    values: dict[str, list[str]] = {}
    for given in given_flags(flags, EvaluateFlags, flat(Config())):
        if given.name not in OWN and not given.name.startswith(KNOB):
            raise UserError(
                f"{given.words[0]!r} is no flag of {DOOR}: paste one of its commands, "
                "or its flags alone"
            )
        values.setdefault(given.name, []).append(given.value or "")
    shown = {name: default_text(name) for name in OWN}
    for name, texts in values.items():
        is_list = name in OWN and isinstance(OWN[name].default, tuple)
        shown[name] = BETWEEN.get(name, LINES).join(texts) if is_list else texts[-1]
    return shown


def flags_of(fields: Mapping[str, str]) -> list[str]:
    """The flags for the text of fields; a field with the default makes none."""
    flags = []
    for name in OWN:
        text = fields.get(name, "").strip()
        if name not in fields or text == default_text(name):
            continue
        if isinstance(OWN[name].default, tuple) and name not in BETWEEN:
            parts = [part.strip() for part in text.splitlines()]
            flags += [f"--{name}={part}" for part in parts if part]
        else:
            flags.append(f"--{name}={text}")
    return flags + [
        flag(path, fields[KNOB + path])
        for path in file_knobs()
        if fields.get(KNOB + path)
    ]


def describe(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Help, limits and choices of flags and knobs, for their fields."""
    knobs = {KNOB + path: field for path, field in _knob_fields().items()}
    for name in names:
        field = OWN.get(name) or knobs[name]
        facts = facts_of(field)
        yield {
            "name": name,
            "help": facts.help,
            "limits": facts.range(),
            "choices": [*facts.choices],
        }


def _knob_fields() -> dict[str, "dataclasses.Field[Any]"]:
    wanted = {*file_knobs()}
    return {path: field for path, field, _ in knob_fields(Config()) if path in wanted}


def check_evaluation(flags: Sequence[str], confined: Confinement) -> EvaluateFlags:
    """Refuses what the command would refuse at once, and files outside of the roots.

    Raises:
      UserError: a flag is wrong, or names a program.
      PageError: a run or data lies outside of the roots.
    """
    fields = fields_of(flags)
    named = [*fields["run"].splitlines(), fields["against"]]
    for written in (each for each in named if each not in ("", BASE)):
        # A file would be a config file, which is a program.
        if not confined.check_run("--run", written).is_dir():
            raise UserError(f"{written} is no folder of a run, or of runs")
    confined.check_data("--data", fields["data"])
    if ":" in fields["metrics"]:
        raise UserError(
            f"--metrics={fields['metrics']}: a metric of your own is a program; start "
            "this command in a shell, and its results appear here"
        )
    return read_flags([DOOR, *flags])[0]
