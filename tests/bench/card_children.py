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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
Result = dict[str, Any]
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)
NOISE = re.compile(r"^[WI]\d{4} |^\s*$")
TAIL = 40
POLL_S = 0.2
# A killed process still has to give back the memory of the card.
DEATH_S = 60.0
# A fork may differ from this process in these variables alone. JAX reads the settings
# when it is imported, so a fork gives them to it again; the compiler, the device and
# the collectives are started later, in the fork, and read theirs then.
JAX_SETTINGS = ("JAX_COMPILATION_CACHE_DIR",)
READ_LATER = ("XLA_", "LIBTPU_INIT_ARGS", "NCCL_")

_forks = False


def share_imports() -> None:
    """Makes later children forks of this process, which has imported what they need."""
    global _forks
    _forks = True
    # A collection in a fork would copy the memory that it shares.
    gc.freeze()


def can_fork(variables: Mapping[str, str]) -> bool:
    """Whether a fork of this process can have these variables."""
    names = {*os.environ, *variables}
    other = [name for name in names if os.environ.get(name) != variables.get(name)]
    return all(x in JAX_SETTINGS or x.startswith(READ_LATER) for x in other)


class Child:
    """A measurement that runs in a process group of its own.

    Attributes:
      failure: once `results` has ended: why it `failed`, and its last words in
        `stderr`; empty if it did not fail.
    """

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
        self._out = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self._err = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.failure: Result = {}
        self._read = 0
        self._other: list[str] = []
        self._process = self._popen = None
        if call and _forks and can_fork(variables):
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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream, file in ((1, self._out), (2, self._err)):
            os.dup2(file.fileno(), stream)
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(ROOT)
        for name in JAX_SETTINGS:
            jax.config.update(name.lower(), variables.get(name))
        call()

    def _exit_code(self, limit: float) -> int | None:
        """The exit code of the process, or None after `limit` seconds."""
        if self._process:
            self._process.join(limit)
            return self._process.exitcode
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(limit)
        return self._popen.returncode

    def _printed(self) -> Iterator[Result]:
        """The results in the lines that it has finished since the last call."""
        size = os.fstat(self._out.fileno()).st_size - self._read
        # Its place in the file is the child's own, and must not move.
        data = os.pread(self._out.fileno(), size, self._read)
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        for line in data.decode(errors="replace").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict):
                yield found
            else:  # Some library's words.
                self._other.append(line)

    def _kill(self) -> None:
        if self._process:  # It may not lead its group yet.
            self._process.kill()
        # Its own children, too: they would hold the card's memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        self._exit_code(DEATH_S)

    def results(self, limit: float | None = None) -> Iterator[Result]:
        """Yields each result when it is printed.

        Nothing of the child is left when this ends or is closed.

        Args:
          limit: seconds after which it is stopped.
        """
        over = float("inf") if limit is None else time.monotonic() + limit
        code = None
        with self._out, self._err:
            try:
                while code is None and (left := over - time.monotonic()) > 0:
                    code = self._exit_code(min(POLL_S, left))
                    yield from self._printed()
            finally:
                self._kill()
            yield from self._printed()
            self._err.seek(0)
            errors = self._err.read().decode(errors="replace").splitlines()
        if code != 0:
            self.failure = self._failure(code, limit, [*self._other, *errors])

    def _failure(
        self, code: int | None, limit: float | None, said: Sequence[str]
    ) -> Result:
        lines = [line for line in said if not NOISE.match(line)]
        failure = (
            f"stopped after {limit:.3g} s" if code is None else f"exit code {code}"
        )
        # The kernel kills with signal 9 what takes too much of the host's memory.
        if code == -signal.SIGKILL or NO_MEMORY.search("\n".join(lines)):
            failure = "out of memory"
        return {"failed": failure, "stderr": lines[-TAIL:]}


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
