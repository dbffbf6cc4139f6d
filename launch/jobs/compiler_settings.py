"""Compiler and library settings per chip, from a file: set before JAX starts.

`default` sets those that suit every run and provably keep every number of a result. A
setting that can change a number, or that nobody has shown not to, must be named to be
set. `default` sets nothing for TPUs: libtpu already uses what Google suggests, the
latency-hiding scheduler and the fusion of asynchronous all-gathers. That fusion exists
on v5e alone; `tpu-sparsecore-gather` hides the gathers of v5p and v6e.

These changes keep every number: another order of the same instructions, another place
or amount of memory, another way to move the same bytes. A setting that fuses, splits or
merges arithmetic may round differently. So may a reduction of merged buffers, because
their parts are then summed in another order around the ring.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.core.errors import UserError, nearest
from research.parallel.chips import CHIPS

FILE = Path(__file__).with_name("compiler_settings.toml")
# These variables hold many flags, and the last flag wins. All others hold one value.
OF_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# jaxlib does not start if both are set; the second one is the old name.
SAME = {"XLA_CLIENT_MEM_FRACTION": "XLA_PYTHON_CLIENT_MEM_FRACTION"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A named choice for one environment variable.

    Attributes:
      chips: the chips of `research/parallel/chips.py` that it is for.
      value: the variable's value, or the flags to add to it.
      changes_numbers: it can change a result, or nobody has shown that it does not.
      why: the reason for `changes_numbers`.
      source: names of the sources that the file lists.
      by_default: whether `default` includes it; never if it changes numbers.
    """

    name: str
    chips: tuple[str, ...]
    variable: str
    value: str
    does: str
    changes_numbers: bool
    why: str
    source: str
    by_default: bool = False


def _load() -> dict[str, Setting]:
    settings = {}
    for name, fields in tomllib.loads(FILE.read_text(encoding="utf-8")).items():
        named = fields.pop("chips")  # Chips, or platforms that stand for all of theirs.
        chips = [c.name for c in CHIPS.values() if {c.name, c.platform} & {*named}]
        value = " ".join(fields.pop("value"))
        settings[name] = Setting(name=name, chips=tuple(chips), value=value, **fields)
    return settings


SETTINGS: Mapping[str, Setting] = _load()


def environment(
    chip: str, asked: Sequence[str], own: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Variables to set before JAX starts, merged with the user's own.

    A flag or variable that the user has set keeps its value; the user's flags come
    last. The result has only variables that a setting changes.

    Args:
      chip: a chip of `research/parallel/chips.py`, or empty if it is not known; then
        `default` sets nothing.
      asked: names of settings and `default`, or `none` alone.
      own: the user's environment.

    Raises:
      UserError: there is no such setting, or it is for other chips.
    """
    added: dict[str, list[str]] = {}
    for setting in _chosen(chip, asked):
        given = own.get(setting.variable, "")
        if setting.variable in OF_FLAGS:
            theirs = {_flag_name(flag) for flag in given.split()}
            flags = added.setdefault(setting.variable, [])
            for flag in setting.value.split():
                if _flag_name(flag) not in theirs and flag not in flags:
                    flags.append(flag)
        elif not given and not own.get(SAME.get(setting.variable, "")):
            added[setting.variable] = [setting.value]
    return {
        variable: " ".join([*values, own.get(variable, "")]).strip()
        for variable, values in added.items()
        if values
    }


def _chosen(chip: str, asked: Sequence[str]) -> list[Setting]:
    names = [name.strip() for name in asked if name.strip()]
    if "none" in names:
        if len(names) > 1:
            raise UserError(f"--settings={','.join(names)}: use none alone")
        return []
    if chip and chip not in CHIPS:
        raise UserError(
            f"no settings are known for chip {chip!r}{nearest(chip, CHIPS)}; "
            "--settings=none sets nothing"
        )
    chosen = {
        setting.name: setting
        for setting in SETTINGS.values()
        if "default" in names and setting.by_default and chip in setting.chips
    }
    for name in names:
        if name == "default":
            continue
        if name not in SETTINGS:
            raise UserError(
                f"--settings={name} is not known{nearest(name, SETTINGS)}; use "
                "default, none, or names of --settings=list"
            )
        if chip and chip not in SETTINGS[name].chips:
            raise UserError(
                f"--settings={name} is for {', '.join(SETTINGS[name].chips)}, not for "
                f"{chip}; remove it"
            )
        chosen[name] = SETTINGS[name]
    return list(chosen.values())


def _flag_name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-")
