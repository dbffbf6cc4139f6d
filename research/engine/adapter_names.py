"""The adapters in the rows of a bank, by name, while requests use them."""

import collections
import dataclasses
import threading

from research.core.errors import UserError
from research.engine.requests import UnknownAdapterError


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in the bank.

    Attributes:
      identity: hash of its content; "" is the base.
      row: of the bank.
    """

    identity: str
    row: int


BASE = LoadedAdapter("", 0)


class AdapterNames:
    """Which name stands for which row; safe to call from any thread.

    A row is free when no name stands for it and no request uses it, so a request ends
    with the adapter that it began with, whatever is loaded meanwhile.
    """

    def __init__(self, rows: int):
        """`rows` is the size of the bank, row 0 of the base included."""
        self._rows = rows
        self._lock = threading.Lock()
        self._names = {"": BASE}
        self._users: collections.Counter[LoadedAdapter] = collections.Counter()

    def identities(self) -> dict[str, str]:
        """The identity of each loaded adapter by name; the base is not among them."""
        names = self._names.copy()
        return {name: loaded.identity for name, loaded in names.items() if name}

    def use(self, name: str, held: LoadedAdapter | None = None) -> LoadedAdapter:
        """The adapter for a request, which has to `release` it.

        Args:
          name: of an adapter.
          held: an adapter in use, which is used again whatever `name` stands for now.

        Raises:
          UnknownAdapterError: no adapter has the name.
        """
        with self._lock:
            loaded = held or self._named(name)
            self._users[loaded] += 1
            return loaded

    def release(self, loaded: LoadedAdapter) -> None:
        """A request does not use the adapter any longer."""
        with self._lock:
            self._users[loaded] -= 1

    def place(self, identity: str) -> tuple[LoadedAdapter, bool]:
        """Where an adapter of this content is or may be, and whether it is there.

        Raises:
          UserError: no row is free.
        """
        with self._lock:
            for loaded in self._taken():
                if loaded.identity == identity:
                    return loaded, True
            free = self._free()
        if not free:
            raise UserError(
                f"all {max(0, self._rows - 1)} rows for adapters are in use, by names "
                "or by answers that run: unload one, or try again when they have ended"
            )
        return LoadedAdapter(identity, min(free)), False

    @property
    def has_room(self) -> bool:
        """Whether a row is free."""
        with self._lock:
            return bool(self._free())

    def _taken(self) -> set[LoadedAdapter]:
        return {*self._names.values(), *(+self._users)}

    def _free(self) -> set[int]:
        return {*range(1, self._rows)} - {loaded.row for loaded in self._taken()}

    def name(self, name: str, loaded: LoadedAdapter) -> None:
        """Lets `name` stand for an adapter that is in its row."""
        if not name:
            raise UserError("an adapter needs a name; the base has none")
        with self._lock:
            self._names[name] = loaded

    def unload(self, name: str) -> None:
        """Forgets a name.

        Raises:
          UnknownAdapterError: no adapter has it.
        """
        with self._lock:
            if self._named(name) is BASE:
                raise UnknownAdapterError("the base cannot be unloaded")
            del self._names[name]

    def _named(self, name: str) -> LoadedAdapter:
        if name not in self._names:
            known = ", ".join(sorted(filter(None, self._names))) or "none"
            raise UnknownAdapterError(f"no adapter is named {name!r}; loaded: {known}")
        return self._names[name]
