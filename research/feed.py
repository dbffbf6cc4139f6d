"""Training batches on the devices, and the position to go on from."""

from collections.abc import Callable, Collection
from typing import Any

from research.data.order import Batches
from research.phases import Phases


class Feed:
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
        phases: Phases,
        position: dict[str, Any] | None = None,
    ):
        self._batches = batches
        self._to_devices = to_devices
        self._skip = frozenset(skip)
        self._phases = phases
        if position is not None:
            batches.set_state(position["data"])
        self.number = (position or {"pulled": 0})["pulled"] - 1
        self.position = self._position()

    def _position(self) -> dict[str, Any]:
        return {"data": self._batches.get_state(), "pulled": self.number + 1}

    def __next__(self) -> Any:
        with self._phases.during("data"):
            batch = next(self._batches)
            self.number += 1
            while self.number in self._skip:
                batch = next(self._batches)
                self.number += 1
            batch, position = self._to_devices(batch), self._position()
        # Only here: a signal that breaks a wait for data off leaves the stream
        # somewhere between two batches, and from here on none is raised.
        self.position = position
        return batch
