"""Many answers from an engine, each as soon as it ends."""

import collections
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TypeVar

from research.core.errors import UserError
from research.engine.continuous_batching import Engine
from research.engine.requests import Piece, Request
from research.engine.slot_programs import CacheBlock

Key = TypeVar("Key")


def ask(
    engine: Engine,
    requests: Mapping[Key, Request],
    read: MutableMapping[Key, CacheBlock],
) -> Iterator[tuple[Key, list[Piece]]]:
    """Yields `(key, pieces of the answer)` in the order in which answers end.

    The longest prompts are answered first: the end then has short ones, and no slot
    waits long for the last. An answer depends on its request alone.

    Args:
      engine: has room for all requests in its queue; nobody else takes its rounds.
      requests: by key.
      read: keys and values of prompts that are known; the engine takes them away.

    Raises:
      UserError: a request cannot be answered, see `Engine.submit`.
    """
    ended: collections.deque[tuple[Key, list[Piece]]] = collections.deque()

    def collector(key: Key) -> Callable[[Piece], None]:
        pieces: list[Piece] = []

        def add(piece: Piece) -> None:
            pieces.append(piece)
            if piece.finish:
                ended.append((key, pieces))

        return add

    for key in sorted(requests, key=lambda key: -len(requests[key].prompt)):
        engine.submit(requests[key], collector(key), read=read.pop(key, None))
    left = len(requests)
    while left:
        engine.step()
        while ended:
            key, pieces = ended.popleft()
            left -= 1
            if error := pieces[-1].error:
                raise UserError(f"{key} could not be answered: {error}")
            yield key, pieces
