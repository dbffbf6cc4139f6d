"""What a run is doing now, and where its wall time has gone."""

import contextlib
import time
from collections.abc import Iterator

# In the order a run meets them; `step` alone is what one pays for.
NAMES = ("start", "compile", "step", "data", "evaluate", "save", "sample", "finish")


class Phases:
    """Exactly one phase at a time; each second belongs to one of them."""

    def __init__(self, age: float = 0.0):
        """`age`: seconds that the process has lived so far, which were its start."""
        self.name = NAMES[0]
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._seconds[self.name] = age
        self._entered = self._sign = time.monotonic()

    def enter(self, name: str) -> None:
        """Leaves the phase before.

        Raises:
          KeyError: there is no such phase.
        """
        now = time.monotonic()
        self._seconds[self.name] += now - self._entered
        self._seconds[name] += 0.0
        self.name, self._entered, self._sign = name, now, now

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Enters a phase, and afterwards the one before again."""
        before = self.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def sign_of_life(self) -> None:
        """Within a phase, something has been done."""
        self._sign = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._sign

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, the present one included."""
        now = time.monotonic()
        more = {self.name: self._seconds[self.name] + now - self._entered}
        return {name: round(s, 3) for name, s in (self._seconds | more).items()}
