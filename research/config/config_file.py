"""Reads config files and sweep files, which are code and can fail in any way."""

import ast
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import ml_collections

from research.config.field_names import explain
from research.config.knobs import flat, to_config_dict
from research.config.run_config import Config, from_config_dict
from research.config.saved_config import from_json, model_and_no_run, near_run
from research.core.errors import UserError, closest, nearest
from research.core.hub_access import is_hub
from research.core.local_paths import expanded
from research.core.visible_text import visible

MODULE = "research_config_file"
# In the words of ml_collections; a dump of the config follows.
MISSING = re.compile(r'Key \\?"(?P<name>[^"\\]*)\\?" does not exist')
LONGEST = 300  # letters of an error of the user's own code
MISFIT = re.compile(
    r"override field '(?P<name>\w+)'.*?\. (?P<value>.*) is of original type <class "
    r"'(?P<found>\w+)'> and cannot be casted to type <class '(?P<wanted>[\w.]+)'>",
    re.DOTALL,
)

# Endings of the config files of other trainers.
OF_OTHERS = {".yml", ".yaml", ".toml", ".json"}


def load_config_file(given: str) -> ml_collections.ConfigDict:
    """Returns the config that the file's `get_config` makes.

    Args:
      given: FILE.py, or FILE.py:TEXT for `get_config(TEXT)`; a run directory, or its
        config.json, for the config of that run.

    Raises:
      UserError: see `call_in_file`; or the function returns something else; or the
        folder holds no config that can be read.
    """
    if run := folder_of_run(given):
        return to_config_dict(_config_of_run(given, run)).lock()
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


def folder_of_run(given: str) -> Path | None:
    """The run directory that `given` names, by itself or by its config.json.

    None if it is neither a folder nor such a file.
    """
    path = expanded(given)
    if os.path.isdir(path):
        return Path(path)
    is_config = path.endswith(".json") and os.path.isfile(path)
    return Path(path).parent if is_config else None


def find_run(given: str, may_be_adapter: bool = False) -> str:
    """The run directory for `--run`, which a config file may name, too.

    Where it `may_be_adapter`, an address on the hub is one of PEFT, and stays as it is.

    Raises:
      UserError: it is a config file that fails, or a model.
    """
    if may_be_adapter and is_hub(given):
        return given
    run = folder_of_run(given)
    if said := model_and_no_run(str(run or given)):
        raise UserError(f"--run={given} {said}")
    if run:
        return str(run)
    if not os.path.isfile(_split(given)[0]):
        return given
    return from_config_dict(load_config_file(given)).run_dir


def _config_of_run(given: str, run: Path) -> Config:
    """The config that a start in `run` resumes it with, wherever it has moved.

    Nothing that an earlier start accepted holds for this one.
    """
    file = run / "config.json"
    if not file.is_file():
        raise UserError(
            f"--config={given}: {run} is no run directory, because it has no "
            f"config.json{near_run(run)}; give a config file, a run directory or its "
            "config.json"
        )
    if said := model_and_no_run(str(run)):
        raise UserError(f"--config={given}: {run} {said}")
    try:
        config = from_json(file.read_text(encoding="utf-8"), run)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"--config={given}: {file} is of no run: {error}") from error
    return dataclasses.replace(config, run_dir=str(run), accept=())


def _split(given: str) -> tuple[str, list[str]]:
    """The file, whose path may hold a colon, and the arguments of `get_config`."""
    given = expanded(given)
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
    file = expanded(file)
    if not os.path.isfile(file):
        name = flag.partition("=")[0]
        kept = "configs/sweeps" if name == "--sweep" else "configs"
        near = _near_file(Path(file), kept)
        meant = f" (did you mean {name}={near}?)" if near else ""
        raise UserError(f"{flag}: there is no such file{meant}")
    if Path(file).suffix in OF_OTHERS:
        raise UserError(
            f"{flag}: this is no Python file, and a config is one: copy "
            "configs/finetune_dolly.py; the names of another trainer, given as flags, "
            "are answered with their names here"
        )
    try:
        module = _load(file)
        call = getattr(module, function, None)
        return module, call(*arguments) if call else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = f"{flag} fails: {_where(file, error)}: {_cause(error)}"
        raise UserError(text) from error


def _near_file(absent: Path, kept: str) -> str:
    """The Python file or run directory most like `absent`.

    It is beside it, or in the folder `kept`, here or where this program lies.
    """
    near: dict[str, Path] = {}
    for folder in (Path(__file__).parents[2] / kept, Path(kept), absent.parent):
        near |= {file.stem: file for file in folder.glob("*.py")}
        near |= {file.parent.name: file.parent for file in folder.glob("*/config.json")}
    found = closest(absent.name.removesuffix(".py"), near)
    return str(near[found]) if found else ""


def _cause(error: BaseException) -> str:
    """The error in one line, with the nearest knobs where there is no such knob."""
    said = _said(error)
    if missing := MISSING.search(said):
        return f"{missing['name']!r}{explain(missing['name'], flat(Config()))}"
    # A group that is read: ml_collections wraps the KeyError of its lookup.
    if isinstance(error, AttributeError) and error.args:
        inner = error.args[0]
        if isinstance(inner, KeyError):
            name = str(inner.args[0]).partition("\n")[0].strip("'\"")
            groups = [field.name for field in dataclasses.fields(Config)]
            if near := nearest(name, groups):
                return f"{name!r} is neither a group nor a knob{near}"
            return f"{name!r}{explain(name, flat(Config()))}"
    if misfit := MISFIT.search(said):
        value, found = misfit["value"], misfit["found"]
        wanted = misfit["wanted"].rpartition(".")[2].replace("ConfigDict", "a group")
        hints = {"tuple": "; is there a comma at the line's end?"}
        hint = f"; write ({value!r},)" if wanted == "tuple" else hints.get(found, "")
        return f"{misfit['name']} is {value} ({found}); it must be {wanted}{hint}"
    text = error.msg if isinstance(error, SyntaxError) else _without_dump(said)
    line = " ".join(f"{type(error).__name__}: {text}".split())
    return visible(line[:LONGEST]).removesuffix(":")


def _said(error: BaseException) -> str:
    """The words of the error, whose class may be the user's and fail to give any."""
    try:
        return str(error)
    except Exception as failure:
        return f"(its text cannot be made: {type(failure).__name__})"


def locate(error: UserError, given: str, overrides: Sequence[str]) -> UserError:
    """The error of a config, with the line of the config file that is to blame.

    `error` may name a knob as `config.optim.name`, which `overrides` set after the file
    did; `given` is that of `load_config_file`.
    """
    if folder_of_run(given):
        return error
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
    return _without_dump(str(error))


def _without_dump(said: str) -> str:
    message, dump, rest = said.partition(". Other fields present")
    return f"{message}. {rest.splitlines()[-1]}" if dump else message


def _load(file: str) -> ModuleType:
    loader = _FreshLoader(MODULE, file)
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # Dataclasses in the file look themselves up here.
    loader.exec_module(module)
    return module


class _FreshLoader(SourceFileLoader):
    """Neither reads nor writes a __pycache__ beside the file.

    Bytecode counts as that of a file with the same size and second of its last change.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _where(file: str, error: BaseException) -> str:
    """The file and the innermost line of it that took part in the error.

    A file with wrong syntax that this one imports is named itself.
    """
    line, frame = None, error.__traceback__
    while frame:
        if frame.tb_frame.f_code.co_filename == file:
            line = frame.tb_lineno
        frame = frame.tb_next
    # Text given to `eval` is no file: the line that runs it is to blame.
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
        file, line = str(error.filename), error.lineno
    return f"{file}:{line}" if line else file
