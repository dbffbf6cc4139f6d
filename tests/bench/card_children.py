"""Processes of measurements: their results, their time limit, and their end.

A child is a new interpreter, or after `share_imports` a fork of this one. JAX starts
its threads and takes the device when it is first used, which is in a child.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
Result = dict[str, Any]
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)
NOISE = re.compile(r"^[WI]\d{4} |^\s*$")
TAIL = 40
# The settings of JAX that a child may have of its own. JAX reads them when it is
# imported, which a fork has behind it.
JAX_SETTINGS = ("JAX_COMPILATION_CACHE_DIR",)

_forks = False


def share_imports() -> None:
    """Makes later children forks of this process, which has imported what they need."""
    global _forks
    _forks = True
    # A collection in a fork would copy the memory that it shares.
    gc.freeze()


class Child:
    """A measurement that runs in a process group of its own."""

    def __init__(
        self,
        argv: Sequence[str],
        variables: Mapping[str, str],
        call: Callable[[], None] | None = None,
    ):
        """Starts it.

        Args:
          argv: of a new interpreter.
          variables: its environment.
          call: what a fork calls in place of `argv`; None for a program of another
            interpreter.
        """
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = self._popen = None
        if call and _forks:
            context = multiprocessing.get_context("fork")
            self._process = context.Process(target=self._enter, args=(variables, call))
            self._process.start()
            self._pid = self._process.pid
        else:
            self._popen = subprocess.Popen(
                argv, cwd=ROOT, env=variables, stdout=self._out, stderr=self._err,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._pid = self._popen.pid

    def _enter(self, variables: Mapping[str, str], call: Callable[[], None]) -> None:
        import jax

        os.setsid()
        for stream, file in ((1, self._out), (2, self._err)):
            os.dup2(file.fileno(), stream)
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(ROOT)
        for name in JAX_SETTINGS:
            jax.config.update(name.lower(), variables.get(name))
        call()

    def _exit_code(self, limit: float | None) -> int | None:
        """The exit code of the process, or None after `limit` seconds."""
        if self._process:
            self._process.join(limit)
            return self._process.exitcode
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(limit)
        return self._popen.returncode

    def finish(self, limit: float | None = None) -> Result:
        """`results` as it printed them, and why it `failed`, with `stderr`.

        Args:
          limit: seconds after which it is stopped.
        """
        try:
            code = self._exit_code(limit)
        finally:
            if self._process:  # It may not lead its group yet.
                self._process.kill()
            # Its own children, too: they would hold the card's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._exit_code(None)
        with self._out, self._err:
            self._out.seek(0)
            self._err.seek(0)
            said, lines = self._out.read().splitlines(), self._err.read().splitlines()
        results = [json.loads(line) for line in said if line[:1] == "{"]
        lines = [line for line in lines if not NOISE.match(line)]
        if code == 0:
            return {"results": results}
        failure = (
            f"stopped after {limit:.3g} s" if code is None else f"exit code {code}"
        )
        # The kernel kills with signal 9 what takes too much of the host's memory.
        if code == -signal.SIGKILL or NO_MEMORY.search("\n".join(lines)):
            failure = "out of memory"
        return {"results": results, "failed": failure, "stderr": lines[-TAIL:]}


def measurement(
    name: str, settings: Mapping[str, Any], variables: Mapping[str, str]
) -> Child:
    """A child that runs a measurement of `card_measures.py`."""

    def call() -> None:
        import card_measures

        card_measures.run(name, settings)

    script = str(BENCH / "card_measures.py")
    argv = [sys.executable, script, name, json.dumps(settings)]
    return Child(argv, variables, call)
