"""The wall time of a run by phase, and the signs of life that the watchdog reads."""

import contextlib
import time
from collections.abc import Iterator

# In the order in which a run meets them. Only `step` is useful work.
PHASES = (
    *("start", "compile", "step", "data"),
    *("evaluate", "save", "sample", "finish"),
)


class PhaseTimer:
    """Charges each second to exactly one phase.

    Attributes:
      name: the current phase.
    """

    def __init__(self, age: float = 0.0):
        """`age`: seconds since the process began, charged to `start`."""
        self.name = PHASES[0]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._seconds[self.name] = age
        self._entered = self._sign = time.monotonic()

    def enter(self, name: str) -> None:
        """Leaves the current phase and enters `name`.

        Raises:
          KeyError: there is no such phase.
        """
        now = time.monotonic()
        self._seconds[self.name] += now - self._entered
        self._seconds[name] += 0.0
        self.name, self._entered, self._sign = name, now, now

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Enters a phase, and returns to the current one afterwards."""
        before = self.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def sign_of_life(self) -> None:
        """Notes that the current phase makes progress."""
        self._sign = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._sign

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, those of the current phase included."""
        now = time.monotonic()
        more = {self.name: self._seconds[self.name] + now - self._entered}
        return {name: round(s, 3) for name, s in (self._seconds | more).items()}
