"""Endless training batches in an order that can be saved and shared."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from research.data.token_batch import Batch

# No run reaches so many. Grain's own endless repeat overflows with batches of one row.
ENDLESS_EPOCHS = 1_000_000_000


Alive = Callable[[], None]
# As `parallel.agreement.union`: fills in the texts that only other processes know.
Union = Callable[[Sequence[str]], list[str]]


def still() -> None:
    """The sign of life that nobody needs."""


class Batches(Protocol):
    """Endless training batches and a position that can be saved.

    The position of a process may lack what only the others know; `joined` adds it.

    Attributes:
      alive: called while data is read or skipped, which may take long.
    """

    alive: Alive

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def joined(self, state: dict[str, Any], union: Union) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class OrderedBatches:
    """Endless training batches of this process's rows.

    Grain orders and repeats row *numbers*, and each process builds only its own rows
    of a global batch, so the stream is the same for any number of processes.
    """

    alive: Alive = staticmethod(still)

    def __init__(
        self,
        order: Any,
        rows_of: Callable[[np.ndarray], Batch],
        batch_size: int,
        mine: Sequence[int] | None = None,
    ):
        """Args:
        order: a grain `MapDataset` of row numbers.
        rows_of: builds a batch from row numbers `[n]`.
        batch_size: rows of a global batch.
        mine: the rows of a global batch that this process builds; by default all.
        """
        import grain

        def batch_of(numbers: Any) -> Batch:
            return rows_of(numbers if mine is None else numbers[list(mine)])

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        batches = order.batch(batch_size).map(batch_of)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position as JSON data."""
        return self._iterator.get_state()

    def joined(self, state: dict[str, Any], union: Union) -> dict[str, Any]:
        """All processes are at the same position."""
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def endless(first: int, count: int, seed: int) -> Any:
    """A grain `MapDataset` over row numbers `first` to `first + count`, repeated.

    Every epoch is another permutation. Grain computes each number when it is needed.
    """
    import grain

    numbers = grain.MapDataset.range(first, first + count).seed(seed)
    return numbers.shuffle().repeat(ENDLESS_EPOCHS)
