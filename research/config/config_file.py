"""Reads a config file, which is code and can fail in any way."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import ml_collections

from research.core.errors import UserError

MODULE = "research_config_file"


def load_config_file(given: str) -> ml_collections.ConfigDict:
    """Returns the config that the file's `get_config` makes.

    Args:
      given: FILE.py, or FILE.py:TEXT for `get_config(TEXT)`.

    Raises:
      UserError: the file is missing, fails, or returns something else. The message has
        the file's name and, if it fails, the line.
    """
    file, colon, argument = given.partition(":")
    arguments = [argument] if colon else []
    if not Path(file).is_file():
        raise UserError(f"--config={file}: there is no such file")
    try:
        result = _load(file).get_config(*arguments)
    except Exception as error:
        line = _line(file, error)
        where = f"{file}:{line}" if line else file
        cause = error.msg if isinstance(error, SyntaxError) else without_dump(error)
        raise UserError(
            f"--config={given} fails: {where}: {type(error).__name__}: "
            + " ".join(cause.split())
        ) from error
    if not isinstance(result, ml_collections.ConfigDict):
        raise UserError(
            f"--config={given}: get_config() returns {type(result).__name__}; it must "
            "return a ConfigDict: start from research.config.defaults()"
        )
    return result


def without_dump(error: Exception) -> str:
    """The message without the field list that ml_collections adds."""
    message, dump, rest = str(error).partition(". Other fields present")
    return f"{message}. {rest.splitlines()[-1]}" if dump else message


def _load(file: str) -> Any:
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
