"""A decoder on the devices of several processes: the first decides, the others follow.

Each process holds its part of one `SlotDecoder` and must call it in the same order. The
first process has the engine. Its calls are collected and told to the others before
those whose result it needs: the tokens of a round, and scores.
"""

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from research.core.errors import LonelyError, UserError
from research.engine.requests import OtherProcessError, Sampling
from research.engine.slot_decoder import (
    CacheBlock,
    Round,
    Scores,
    SlotDecoder,
    SlotSettings,
)
from research.parallel import agreement
from research.weights.adapters.serving_bank import Row

Call = tuple[Any, ...]
Tell = Callable[[Any], Any]
# Returns what must be equal in all processes, and the result.
Perform = Callable[[Any], tuple[str, Any]]


class FollowedBlock:
    """Keys and values of a chunk, which every process holds its part of."""

    def __init__(self, number: int, nbytes: int):
        self.number, self.nbytes = number, nbytes


class LeadingDecoder:
    """The decoder of the first process; it has all that a `SlotDecoder` has.

    An error of a call is raised by the next one that has a result.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        tell: Tell = agreement.of_first,
        perform: Perform = lambda task: ("", None),
        check: Callable[[Any], None] = lambda task: None,
    ):
        """Every other process calls `follow` with its decoder.

        Args:
          decoder: with parameters.
          tell: gives a JSON value to all processes, each of which calls it.
          perform: does a task of `everywhere` in this process, and returns what must
            be equal in all of them beside the result. It may wait for the others.
          check: raises UserError if this process cannot do a task. It waits for
            none, and nobody begins the task before all have checked it.
        """
        self._decoder, self._tell = decoder, tell
        self._perform = _after_a_check(perform, check)
        # Blocks are dropped wherever Python collects them, also inside a call.
        self._calls: collections.deque[Call] = collections.deque()
        self._blocks: dict[int, Any] = {}
        self._rows: dict[str, Row] = {}
        self._numbers = self._block_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def warm_up(self) -> None:
        """Compiles every program in all processes."""
        self._now("warm_up")

    def admit(self, slot: int, settings: SlotSettings) -> None:
        """See `SlotDecoder`."""
        values = dataclasses.asdict(
            dataclasses.replace(settings, sampling=None, stop_ids=())
        )
        sampling = dataclasses.asdict(
            dataclasses.replace(settings.sampling, logit_bias={})
        )
        if settings.sampling.repetition_penalty == 1:
            values["prompt_ids"] = ()
        bias = sorted(settings.sampling.logit_bias.items())
        values["stop_ids"] = sorted(settings.stop_ids)
        self._later("admit", slot, values, sampling, bias)

    def free(self, slot: int) -> None:
        """See `SlotDecoder`."""
        self._later("free", slot)

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """See `SlotDecoder`."""
        self._later("extend", slot, list(ids))

    def start(self, slot: int, token: int) -> None:
        """See `SlotDecoder`."""
        self._later("start", slot, token)

    def constrain(self, slot: int, allowed: np.ndarray | None) -> None:
        """See `SlotDecoder`."""
        words = None if allowed is None else allowed.view(np.uint32).tolist()
        self._later("constrain", slot, words)

    def decode(self) -> Round:
        """See `SlotDecoder`."""
        return self._now("decode")

    def launch(self) -> Round:
        """As `decode`: all processes wait here, and an error belongs to its call."""
        return self.decode()

    def score(
        self, slot: int, ids: Sequence[int], next_ids: Sequence[int], top: int = 0
    ) -> Scores:
        """See `SlotDecoder`."""
        return self._now("score", slot, list(ids), list(next_ids), top)

    def read_block(self, slot: int, index: int) -> FollowedBlock:
        """See `SlotDecoder`. The other processes keep their parts as long as this."""
        self._numbers += 1
        call = ("read_block", slot, index, self._numbers)
        if self._block_bytes:
            self._later(*call)
        else:  # All have one size.
            self._block_bytes = self._now(*call).nbytes
        found = FollowedBlock(self._numbers, self._block_bytes)
        weakref.finalize(found, self._later, "drop", found.number).atexit = False
        return found

    def write_block(self, slot: int, index: int, block: FollowedBlock) -> None:
        """See `SlotDecoder`."""
        self._later("write_block", slot, index, block.number)

    def write_prompt(self, slot: int, block: CacheBlock) -> None:
        """Raises ValueError: only this process has the keys and values."""
        raise ValueError(
            f"slot {slot}: the other processes have no keys and values of the prompt"
        )

    def set_row(self, index: int, row: Row, identity: str) -> None:
        """See `SlotDecoder`. The other processes read the row by its identity."""
        self._rows[identity] = row
        self._now("set_row", index, identity)
        self._rows.clear()

    def everywhere(self, task: Any) -> Any:
        """The result of `perform(task)` here; all processes do it at the same time.

        Args:
          task: a JSON value.

        Raises:
          UserError: this process cannot do it; all continue.
          OtherProcessError: another one cannot; all continue.
        """
        return self._now("perform", task)

    def flush(self) -> None:
        """Makes the calls that wait.

        The other processes wait inside a collective operation, so an engine without
        requests calls this now and then.
        """
        self._now("rest")

    def end(self) -> None:
        """Lets the other processes return from `follow`; no call is possible then."""
        self._now("end")
        self._tell = _refuse

    def _later(self, *call: Any) -> None:
        self._calls.append(call)

    def _now(self, *call: Any) -> Any:
        calls: list[Call] = []
        while self._calls:
            calls.append(self._calls.popleft())
        calls.append(call)
        read_row = self._rows.__getitem__
        with _naming_the_lost():
            self._tell(calls)
            results = [
                _make(self._decoder, self._blocks, each, read_row, self._perform)
                for each in calls
            ]
        return results[-1]


def follow(
    decoder: SlotDecoder,
    read_row: Callable[[str], Row],
    tell: Tell = agreement.of_first,
    perform: Perform = lambda task: ("", None),
    check: Callable[[Any], None] = lambda task: None,
) -> None:
    """Does what the first process does, until it ends.

    Args:
      decoder: of the same sizes, with this process's part of the same parameters.
      read_row: gives the adapter of an identity.
      tell, perform, check: see `LeadingDecoder`.

    Raises:
      LonelyError: another process is gone.
    """
    perform = _after_a_check(perform, check)
    blocks: dict[int, Any] = {}
    call: Call = ("rest",)
    while call[0] != "end":
        with _naming_the_lost():
            for call in tell(None):
                try:
                    _make(decoder, blocks, call, read_row, perform)
                except UserError as error:
                    # A task that failed has failed in all processes.
                    if call[0] != "perform" or isinstance(error, LonelyError):
                        raise


def _after_a_check(perform: Perform, check: Callable[[Any], None]) -> Perform:
    def perform_if_all_can(task: Any) -> tuple[str, Any]:
        own: list[None] = []
        try:
            agreement.together(lambda: own.append(check(task)))
        except LonelyError:
            raise
        except UserError as error:
            raise (OtherProcessError(str(error)) if own else error) from error
        result = perform(task)
        agreement.together(lambda: None, lambda _: {"what was read": result[0]})
        return result

    return perform_if_all_can


def _refuse(value: Any) -> None:
    raise LonelyError("the other processes of this server have ended")


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Names what stops all processes, of which one is gone or has failed."""
    try:
        yield
    except Exception as error:
        is_lost = isinstance(error, LonelyError) or agreement.is_of_devices(error)
        if not is_lost or jax.process_count() == 1:
            raise
        first_line = str(error.__cause__ or error).partition("\n")[0][:200]
        raise LonelyError(
            "another process of this server is gone, or a step of all has failed "
            f"({first_line}); their own output says why; start all of them again"
        ) from error


def _make(
    decoder: SlotDecoder,
    blocks: dict[int, Any],
    call: Call,
    read_row: Callable[[str], Row],
    perform: Perform,
) -> Any:
    """Makes one call, the same in every process."""
    name, *given = call
    match name:
        case "rest" | "end":
            return None
        case "perform":
            return perform(*given)[1]
        case "drop":
            return blocks.pop(given[0])
        case "admit":
            slot, values, sampling, bias = given
            sampling = Sampling(**{**sampling, "logit_bias": dict(map(tuple, bias))})
            stop_ids = frozenset(values["stop_ids"])
            settings = {**values, "sampling": sampling, "stop_ids": stop_ids}
            return decoder.admit(slot, SlotSettings(**settings))
        case "constrain":
            slot, words = given
            bits = None if words is None else np.array(words, np.uint32)
            return decoder.constrain(slot, bits)
        case "read_block":
            slot, index, number = given
            return blocks.setdefault(number, decoder.read_block(slot, index))
        case "write_block":
            slot, index, number = given
            return decoder.write_block(slot, index, blocks[number])
        case "set_row":
            index, identity = given
            return decoder.set_row(index, read_row(identity), identity)
    return getattr(decoder, name)(*given)
