"""Things that other threads have done by the one that takes the rounds."""

import collections
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from research.core.errors import LonelyError
from research.engine.requests import EngineStoppedError

Command = tuple[Callable[[], Any], Future[Any]]


class RoundCommands:
    """Commands that run between two rounds, in order.

    Those that need empty slots wait for them, and until then no request gets a slot.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[Command] = collections.deque()
        self._for_empty: collections.deque[Command] = collections.deque()
        self._refused = ""

    def put(self, command: Callable[[], Any], when_empty: bool) -> Future[Any]:
        """Adds a command; `when_empty` lets it wait until no slot is in use.

        Raises:
          EngineStoppedError: commands are refused now.
        """
        if self._refused:
            raise EngineStoppedError(self._refused)
        done: Future[Any] = Future()
        (self._for_empty if when_empty else self._waiting).append((command, done))
        return done

    def __bool__(self) -> bool:
        """Whether any command waits."""
        return bool(self._waiting or self._for_empty)

    @property
    def need_empty_slots(self) -> bool:
        """Whether a command waits until no slot is in use."""
        return bool(self._for_empty)

    def run(self, are_empty: bool) -> int:
        """Runs the commands whose time has come; returns how many.

        Args:
          are_empty: whether no slot is in use.

        Raises:
          LonelyError: another process is gone; the command has ended with it, too.
        """
        count = 0
        for queue in (self._waiting, self._for_empty if are_empty else ()):
            while queue:
                command, done = queue.popleft()
                count += 1
                try:
                    done.set_result(command())
                except Exception as error:
                    done.set_exception(error)
                    if isinstance(error, LonelyError):
                        raise
        return count

    def refuse(self, why: str) -> None:
        """Ends all commands with EngineStoppedError: those that wait and any later."""
        self._refused = why
        for queue in (self._waiting, self._for_empty):
            while queue:
                queue.popleft()[1].set_exception(EngineStoppedError(why))
