"""JSON files that a program wrote, and that may hold something else by now."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from types import FunctionType
from typing import Any

from research.core.errors import UserError

# A type, a list with the shape of its items, a dictionary with the shape of each entry
# that must be there, or a function from the value to its shape. A dictionary may hold
# other entries, too; the key `...` gives their shape.
Shape = Any
NUMBER = int | float
LARGEST = 2**63  # Beyond it, an int fits no column and no float.


def read_json(path: Path, shape: Shape, remedy: str, absent: Any = None) -> Any:
    """Reads a file.

    Args:
      path: of the file.
      shape: of its value.
      remedy: what the user can do where the file holds something else.
      absent: what to return where nothing has this name; None: the file must be there.

    Raises:
      UserError: it cannot be read, or its value has another shape; names file, place
        and remedy.
    """
    # A folder or a link that leads nowhere is not an absent file.
    if absent is not None and not os.path.lexists(path):
        return absent
    try:
        value = json.loads(path.read_bytes())
        problem = mismatch(value, shape)
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(f"{path} cannot be used ({problem}); {remedy}")
    return value


def read_json_lines(path: Path, shape: Shape) -> tuple[list[Any], list[int]]:
    """Reads a file with one value in a line.

    A last line without a line end counts as any other. A kill may have torn it.

    Returns:
      The values of `shape`, and the numbers of all other lines, counted from 1. Both
      are empty where there is no file.

    Raises:
      OSError: the file cannot be read.
      UserError: it is no file.
    """
    values: list[Any] = []
    bad: list[int] = []
    if not os.path.lexists(path):
        return values, bad
    require_file(path)
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            fits = not mismatch(value, shape)
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
      UserError: it is no file.
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


def require_file(path: Path) -> None:
    """Raises UserError if something has this name that is not a file."""
    if os.path.lexists(path) and not path.is_file():
        found = "a folder" if path.is_dir() else "no file, or a link that leads nowhere"
        raise UserError(
            f"{path} cannot be used (it is {found}); restore a copy of the file, or "
            "move what is there away"
        )


def mismatch(value: Any, shape: Shape, where: str = "it") -> str:
    """The first place where `value` has another shape; empty if there is none."""
    if isinstance(shape, FunctionType):
        shape = shape(value)
    kind = type(shape) if isinstance(shape, list | dict) else shape
    # To Python, a bool is an int.
    fits = isinstance(value, kind)
    if isinstance(value, int) and kind is not object:
        is_bool = isinstance(value, bool)
        fits &= kind is bool if is_bool else -LARGEST <= value < LARGEST
    if not fits:
        name = getattr(kind, "__name__", None) or str(kind)
        return f"{where} is {repr(value)[:80]}, not {name}"
    if isinstance(shape, list):
        parts = [(x, shape[0], f"{where}[{i}]") for i, x in enumerate(value)]
    elif isinstance(shape, dict):
        if missing := shape.keys() - value.keys() - {...}:
            return f"{where} lacks {', '.join(sorted(missing))}"
        others = shape.get(..., object)
        parts = [(x, shape.get(k, others), f"{where}.{k}") for k, x in value.items()]
    else:
        parts = []
    return next(filter(None, (mismatch(*part) for part in parts)), "")
