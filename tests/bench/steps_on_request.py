"""A process that takes a training step whenever it is asked, for benchmarks in turns.

Sides that stand ready and step one after the other meet the same hour of the machine.
The standard library alone, because each side has an interpreter of its own.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def serve(step: Callable[[], float], about: Mapping[str, Any]) -> None:
    """Prints `about`, then for each line of standard input what one step took.

    Args:
      step: takes one step, waits for it and returns its loss.
      about: what the side is.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries print, too, and nothing of theirs may stand among the answers.
    os.dup2(2, 1)
    print(json.dumps(about), file=answers)
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        took = time.perf_counter() - begun
        # Linux gives KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps({"seconds": took, "loss": loss, "memory_gb": peak / 1e9}),
            file=answers,
        )


class Side:
    """A side that runs, seen from the process that gives it its turns."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]):
        """Starts it; `about` waits until it is ready."""
        self.name = name
        self.seconds: list[float] = []
        self.last: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env=variables, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """The side's description of itself. Raises RuntimeError: it has ended."""
        return self._answer()

    def step(self) -> None:
        """One step. Raises RuntimeError: the side has ended."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        self.last = self._answer()
        self.seconds.append(self.last["seconds"])

    def close(self) -> None:
        """Ends the side."""
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            # Before `serve`, libraries may print what they like.
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        end = "\n".join(self._errors.read().splitlines()[-30:])
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{end}")
