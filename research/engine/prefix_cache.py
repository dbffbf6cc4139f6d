"""Keys and values of prompt beginnings that were computed before, by their content."""

import collections
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Sized(Protocol):
    """Arrays that take `nbytes` bytes."""

    @property
    def nbytes(self) -> int: ...


def chunk_keys(identity: str, ids: Sequence[int], chunk: int) -> list[bytes]:
    """One key for each whole chunk of a prompt.

    A key stands for the adapter's content and for all ids up to the end of its chunk,
    so equal keys mean equal keys and values. The name of an adapter is not in it: a
    name may get other content.

    Args:
      identity: of the adapter's content; "" for the base.
      ids: of the prompt.
      chunk: ids a chunk.
    """
    key = hashlib.sha256(identity.encode()).digest()
    keys = []
    for start in range(0, len(ids) - chunk + 1, chunk):
        part = np.asarray(ids[start : start + chunk], np.int64).tobytes()
        key = hashlib.sha256(key + part).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """Blocks by key; the block that was used least recently leaves first.

    A block that leaves while someone holds it stays whole for its holder.

    Attributes:
      capacity: the most bytes of all blocks together.
      nbytes: their bytes now.
    """

    def __init__(self, capacity: int):
        """With a capacity of 0 nothing is kept."""
        self.capacity, self.nbytes = capacity, 0
        self._blocks: collections.OrderedDict[bytes, Sized] = collections.OrderedDict()

    def clear(self) -> None:
        """Drops all blocks."""
        self._blocks.clear()
        self.nbytes = 0

    def find(self, keys: Sequence[bytes]) -> list[Sized]:
        """The blocks of the longest beginning of `keys` that is here."""
        found = []
        for key in keys:
            if key not in self._blocks:
                break
            found.append(self._blocks[key])
        # A chain leaves from its end: without its beginning the rest is of no use.
        for key in reversed(keys[: len(found)]):
            self._blocks.move_to_end(key)
        return found

    def add(self, keys: Sequence[bytes], read: Callable[[int], Sized]) -> None:
        """Keeps the blocks of a chain, as many from its beginning as there is room for.

        Args:
          keys: of the whole chain.
          read: gives block i of it.
        """
        room = self.capacity
        blocks = []
        for index, key in enumerate(keys):
            block = self._blocks[key] if key in self._blocks else read(index)
            room -= block.nbytes
            if room < 0:
                break
            blocks.append((key, block))
        for key, block in reversed(blocks):
            if key not in self._blocks:
                self._blocks[key] = block
                self.nbytes += block.nbytes
            self._blocks.move_to_end(key)
        while self.nbytes > self.capacity:
            self.nbytes -= self._blocks.popitem(last=False)[1].nbytes
