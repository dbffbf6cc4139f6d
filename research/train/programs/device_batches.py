"""Training batches on the devices, and the position to go on from."""

from collections.abc import Callable, Collection
from typing import Any

from research.data.batch_order import Batches
from research.data.token_batch import Batch
from research.runs.phase_timer import PhaseTimer

Numbered = tuple[int, Batch]


class DeviceBatches:
    """Numbers the batches of a stream, and leaves out those that are to be skipped.

    Attributes:
      position: of the first batch that was not handed out: JSON-able.
      number: of the last batch that was handed out, counted from 0 over the run.
    """

    def __init__(
        self,
        batches: Batches,
        to_devices: Callable[[Any], Any],
        skip: Collection[int],
        phases: PhaseTimer,
        position: dict[str, Any] | None = None,
        wait: Callable[[Callable[[], Numbered]], Numbered] = lambda pull: pull(),
    ):
        """Args:
        batches: of host arrays.
        to_devices: what makes one a batch for the step.
        skip: numbers of batches to leave out.
        phases: told of the wait.
        position: to go on from; None for the beginning.
        wait: calls what waits for a batch, and may break it off, see `stopping`.
        """
        self._batches = batches
        self._to_devices = to_devices
        self._skip = frozenset(skip)
        self._phases = phases
        self._wait = wait
        if position is not None:
            batches.set_state(position["data"])
        self.number = (position or {"pulled": 0})["pulled"] - 1
        self.position = {"data": batches.get_state(), "pulled": self.number + 1}

    def __next__(self) -> Any:
        with self._phases.during("data"):
            number, batch = self._wait(self._pull)
            position = {"data": self._batches.get_state(), "pulled": number + 1}
            batch = self._to_devices(batch)
        # Only here: a signal that breaks a wait for data off leaves the stream
        # somewhere between two batches, and from here on none is raised.
        self.number, self.position = number, position
        return batch

    def _pull(self) -> Numbered:
        number, batch = self.number + 1, next(self._batches)
        while number in self._skip:
            number, batch = number + 1, next(self._batches)
        return number, batch
