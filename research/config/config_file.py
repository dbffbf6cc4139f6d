"""Reads config files and sweep files, which are code and can fail in any way."""

import ast
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError

MODULE = "research_config_file"
# In the words of ml_collections; a dump of the config follows.
MISSING = re.compile(r'Key \\?"(?P<name>[^"\\]*)\\?" does not exist')
MISFIT = re.compile(
    r"override field '(?P<name>\w+)'.*?\. (?P<value>.*) is of original type <class "
    r"'(?P<found>\w+)'> and cannot be casted to type <class '(?P<wanted>[\w.]+)'>",
    re.DOTALL,
)


def load_config_file(given: str) -> ml_collections.ConfigDict:
    """Returns the config that the file's `get_config` makes.

    Args:
      given: FILE.py, or FILE.py:TEXT for `get_config(TEXT)`.

    Raises:
      UserError: see `call_in_file`; or the function returns something else.
    """
    file, arguments = _split(given)
    module, result = call_in_file(f"--config={given}", file, "get_config", *arguments)
    if not isinstance(result, ml_collections.ConfigDict):
        make = getattr(module, "get_config", None)
        line = getattr(getattr(make, "__code__", None), "co_firstlineno", 1)
        found = f"returns {type(result).__name__}" if make else "is missing"
        raise UserError(
            f"--config={given} fails: {file}:{line}: get_config() {found}; it must "
            "return a ConfigDict: start from research.config.defaults(), and end with "
            "`return config`"
        )
    return result


def _split(given: str) -> tuple[str, list[str]]:
    """The file, whose path may hold a colon, and the arguments of `get_config`."""
    given = os.path.expanduser(given)
    file, colon, argument = given.rpartition(":")
    return (file, [argument]) if colon and not os.path.isfile(given) else (given, [])


def call_in_file(
    flag: str, file: str, function: str, *arguments: str
) -> tuple[ModuleType, Any]:
    """A Python file as a module, and the result of its function, None without it.

    Raises:
      UserError: the file is missing, or fails. The message begins with `flag`, and has
        the file's name and, if it fails, the line.
    """
    file = os.path.expanduser(file)
    if not os.path.isfile(file):
        raise UserError(f"{flag}: there is no such file")
    try:
        module = _load(file)
        call = getattr(module, function, None)
        return module, call(*arguments) if call else None
    except (Exception, SystemExit) as error:
        line = _line(file, error)
        where = f"{file}:{line}" if line else file
        raise UserError(f"{flag} fails: {where}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The error in one line, with the nearest knobs where there is no such knob."""
    if missing := MISSING.search(str(error)):
        return f"{missing['name']!r} is not a knob{nearest_knobs(missing['name'])}"
    if misfit := MISFIT.search(str(error)):
        value, found = misfit["value"], misfit["found"]
        wanted = misfit["wanted"].rpartition(".")[2].replace("ConfigDict", "a group")
        hints = {"tuple": "; is there a comma at the line's end?"}
        hint = f"; write ({value!r},)" if wanted == "tuple" else hints.get(found, "")
        return f"{misfit['name']} is {value} ({found}); it must be {wanted}{hint}"
    text = error.msg if isinstance(error, SyntaxError) else without_dump(error)
    return " ".join(f"{type(error).__name__}: {text}".split())


def nearest_knobs(name: str) -> str:
    """` (did you mean 'optim.learning_rate'?)`: knobs whose last part is closest."""
    by_last: dict[str, list[str]] = {}
    for path in flat(Config()):
        by_last.setdefault(path.rpartition(".")[2], []).append(path)
    near = difflib.get_close_matches(name, by_last, n=1, cutoff=0.5)
    paths = " or ".join(map(repr, by_last[near[0]])) if near else ""
    return f" (did you mean {paths}?)" if near else ""


def locate(error: UserError, given: str, overrides: Sequence[str]) -> UserError:
    """The error of a config, with the line of the config file that is to blame.

    `error` may name a knob as `config.optim.name`, which `overrides` set after the file
    did; `given` is that of `load_config_file`.
    """
    file, _ = _split(given)
    named = re.search(r"\bconfig\.([\w.]+\w)", str(error))
    knob = named[1] if named else ""
    flags = [flag.partition("=")[0].lstrip("-") for flag in overrides]
    line = None if f"config.{knob}" in flags else _line_that_sets(file, knob)
    if not line:
        return error
    return UserError(f"--config={given} fails: {file}:{line}: {error}")


def _line_that_sets(file: str, knob: str) -> int | None:
    """The last line that assigns to an attribute such as `config.optim.name`."""
    found = None
    for node in ast.walk(ast.parse(Path(file).read_bytes())):
        targets = node.targets if isinstance(node, ast.Assign) else ()
        for target in targets:
            # Without the variable, which may stand for the config or a group.
            path = ast.unparse(target).partition(".")[2]
            if path and f".{knob}".endswith(f".{path}"):
                found = max(found or 0, node.lineno)
    return found


def without_dump(error: BaseException) -> str:
    """The message without the field list that ml_collections adds."""
    message, dump, rest = str(error).partition(". Other fields present")
    return f"{message}. {rest.splitlines()[-1]}" if dump else message


def _load(file: str) -> ModuleType:
    loader = SourceFileLoader(MODULE, file)
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # Dataclasses in the file look themselves up here.
    loader.exec_module(module)
    return module


def _line(file: str, error: BaseException) -> int | None:
    """The innermost line of the file that took part in the error."""
    if isinstance(error, SyntaxError) and error.filename:
        return error.lineno if Path(error.filename).samefile(file) else None
    line, frame = None, error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == file:
            line = frame.tb_lineno
        frame = frame.tb_next
    return line
