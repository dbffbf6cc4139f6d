"""The rows of a dataset on the hub, shard by shard; a dropped connection is retried.

The library's own state of a shard is the place at which reading can start again. It is
exact to the row; what the shard's file holds before it may be read once more.
"""

import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

from research.core.errors import UnreachableError, UserError
from research.core.hub_access import HubAddress
from research.data.batch_order import Alive, still
from research.data.row_readers import Located, Place, Reading

RETRIES = 6
FIRST_WAIT = 2.0  # seconds; each further wait is twice as long
SLICE = 1.0  # seconds of a wait between two signs of life
# Packages whose errors come from the network; most of them are no OSError.
CLIENTS = {"aiohttp", "http", "httpcore", "httpx", "requests", "urllib3"}


def _is_of_network(error: BaseException | None) -> bool:
    """Whether a failure of the network is `error`, or has led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if isinstance(error, OSError) or packages & CLIENTS:
            return True
        error = error.__cause__ or error.__context__
    return False


class HubRows:
    """The rows of one dataset on the hub, at one revision."""

    def __init__(self, address: HubAddress, what: str):
        """Args:
        address: of the dataset, at a commit.
        what: names it in messages to the user.
        """
        self._address = address
        self._what = what

    @functools.cached_property
    def _dataset(self) -> Any:
        import datasets

        address = self._address
        return self._tried(
            lambda: datasets.load_dataset(
                address.name,
                address.subset or None,
                split=address.split or "train",
                revision=address.revision,
                streaming=True,
            )
        )

    @property
    def num_shards(self) -> int:
        """The number of shards; each can be read without the others.

        Raises:
          UserError: there is no such dataset, subset or split, or the hub is away.
        """
        return self._dataset.num_shards

    def read(self, reading: Reading) -> Iterator[Located]:
        """Yields `(place, where, row)` of the shards from `begin` to `end`.

        Raises:
          UserError: the rows cannot be read; names the row.
          UnreachableError: the hub did not answer through all retries.
        """
        dataset = self._dataset  # An error of opening it is raised as it is.
        end = dataset.num_shards if reading.end is None else reading.end
        first, state = reading.start.at or (reading.begin, None)
        number, failures = reading.start.number, 0
        for shard in range(first, end):
            rows: Iterator[Any] | None = None
            while True:
                try:
                    if rows is None:
                        part = dataset.shard(dataset.num_shards, shard)
                        if state is not None:
                            part.load_state_dict(state)
                        rows = iter(part)
                    row = next(rows, None)
                except Exception as error:
                    failures += 1
                    what = f"{self._what}, row {number + 1},"
                    self._wait_or_raise(error, failures, what, reading.alive)
                    rows = None
                    continue
                if row is None:
                    break
                failures = 0
                place = Place([shard, state], number)
                yield place, f"{self._address.name}: row {number + 1}", row
                state, number = part.state_dict(), number + 1
            state = None

    def _tried(self, call: Any) -> Any:
        """The result of `call`, which is retried after a failure of the network."""
        failures = 0
        while True:
            try:
                return call()
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, failures, self._what)

    def _wait_or_raise(
        self, error: Exception, failures: int, what: str, alive: Alive = still
    ) -> None:
        """Waits before another try of `what`, or raises what the user should read."""
        missing = isinstance(error, FileNotFoundError)
        if missing or not _is_of_network(error):
            raise UserError(
                f"{what} cannot be read ({error}); check subset, split and revision of "
                "the dataset, or give local files"
            ) from error
        if failures > RETRIES:
            raise UnreachableError(
                f"{what} cannot be read ({error}), in {failures} tries; what is "
                "done is kept: start the same command again when the hub answers"
            ) from error
        wait = FIRST_WAIT * 2 ** (failures - 1)
        logging.warning(
            "data: %s dropped the connection (%s); try %d of %d in %.0f s",
            self._what, error, failures, RETRIES, wait,
        )  # fmt: skip
        while wait > 0:
            alive()
            time.sleep(min(wait, SLICE))
            wait -= SLICE
