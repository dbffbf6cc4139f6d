"""JSON files that a program wrote, and that may hold something else by now."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from research.core.errors import UserError

# A type, a list with the shape of its items, or a dictionary with the shape of each
# entry that must be there. Other entries may be there, too.
Shape = Any
NUMBER = int | float


def read_json(path: Path, shape: Shape, remedy: str) -> Any:
    """Reads a file that must be there.

    Args:
      path: of the file.
      shape: of its value.
      remedy: what the user can do where the file holds something else.

    Raises:
      UserError: it cannot be read, or its value has another shape; names file, place
        and remedy.
    """
    try:
        value = json.loads(path.read_bytes())
        problem = _mismatch(value, shape)
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(f"{path} cannot be used ({problem}); {remedy}")
    return value


def read_json_lines(path: Path, shape: Shape) -> tuple[list[Any], list[int]]:
    """Reads a file with one value in a line.

    A last line without an end is ignored: a kill has torn it.

    Returns:
      The values of `shape`, and the numbers of all other lines, counted from 1. Both
      are empty where there is no file.

    Raises:
      OSError: the file cannot be read.
    """
    values: list[Any] = []
    bad: list[int] = []
    if not path.is_file():
        return values, bad
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            fits = not _mismatch(value, shape)
        except (ValueError, RecursionError):
            fits = False
        if fits:
            values.append(value)
        else:
            bad.append(number)
    return values, bad


def read_to_rewrite(path: Path, shape: Shape) -> list[Any]:
    """Reads the lines of a file that is about to be written anew.

    If lines of it cannot be read, a copy of the file stays beside it, and a warning
    names both.

    Raises:
      OSError: the file cannot be read, or the copy not be written.
    """
    values, bad = read_json_lines(path, shape)
    if bad:
        copy = path.with_name(f"{path.name}.{time.time_ns():x}.unreadable")
        shutil.copyfile(path, copy)
        logging.warning(
            "%s: %d of %d lines cannot be read and are dropped (line %s); the file as "
            "it was is kept as %s",
            path,
            len(bad),
            len(bad) + len(values),
            ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5),
            copy,
        )
    return values


def _mismatch(value: Any, shape: Shape, where: str = "it") -> str:
    """The first place where `value` has another shape; empty if there is none."""
    kind = type(shape) if isinstance(shape, list | dict) else shape
    # To Python, a bool is an int.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = getattr(kind, "__name__", None) or str(kind)
        return f"{where} is {repr(value)[:80]}, not {name}"
    if isinstance(shape, list):
        parts = [(x, shape[0], f"{where}[{i}]") for i, x in enumerate(value)]
    elif isinstance(shape, dict):
        if missing := shape.keys() - value.keys():
            return f"{where} lacks {', '.join(sorted(missing))}"
        parts = [(value[key], shape[key], f"{where}.{key}") for key in shape]
    else:
        parts = []
    return next(filter(None, (_mismatch(*part) for part in parts)), "")
