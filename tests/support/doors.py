"""Runs a command inside this process, and returns what it says and how it ends."""

import contextlib
import dataclasses
import io
import logging
import os
import sys
import warnings
from unittest import mock

from research.config import command_line


@dataclasses.dataclass
class Ended:
    """How a command ended; the names are those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run_door(main, folder, *argv):
    """Calls `main` through `command_line.run`, in `folder`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", list(argv)),
        mock.patch.dict(os.environ),
        mock.patch.multiple(logging.getLogger(), handlers=[], level=logging.WARNING),
        warnings.catch_warnings(),
    ):
        # ml_collections loads a config file the old way.
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
        # Another test may have logged more, and the logger remembers what it lets by.
        logging.getLogger().setLevel(logging.WARNING)
        code = None
        try:
            command_line.run(main)
        except SystemExit as ended:
            code = ended.code or 0
    return Ended(code, out.getvalue(), err.getvalue())
