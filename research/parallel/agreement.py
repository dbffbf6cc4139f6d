"""Processes of a run continue only if all have succeeded and found the same facts.

Each process hands in a hash of its facts. One all-reduce of a few bytes says whether
all hashes are equal, so the cost does not grow with the number of processes. Details
travel only if hashes differ or a process has failed.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core.errors import LonelyError, UserError

# Letters that travel at a time: texts of any length need one program.
PIECE = 4096
Value = TypeVar("Value")
Facts = Mapping[str, str]


def together(
    work: Callable[[], Value], facts: Callable[[Value], Facts] = lambda _: {}
) -> Value:
    """Returns `work()` once it has succeeded in every process, with the same facts.

    Every process calls this. A failure of one is raised in all of them.

    Args:
      work: must not wait for another process, because that one may have failed.
      facts: what must be equal in all processes, by name, given the result.

    Raises:
      UserError: facts differ, each of which is named; or another process raised it.
      LonelyError: another process has failed by a defect, or is gone.
    """
    if jax.process_count() == 1:
        return work()
    group = _Group(jax.process_index(), jax.process_count(), _maximum)
    return group.together(work, facts)


def everywhere(flag: bool) -> bool:
    """Whether `flag` is set in all processes, each of which calls this."""
    if jax.process_count() == 1:
        return flag
    return not _maximum(np.array([not flag], np.int32))[0]


def of_first(value: Any) -> Any:
    """The JSON `value` of the first process, in all processes, which all call this."""
    if jax.process_count() == 1:
        return value
    group = _Group(jax.process_index(), jax.process_count(), _maximum)
    return json.loads(group.said_by(0, json.dumps(value)))


def union(texts: Sequence[str]) -> list[str]:
    """ASCII texts, each of which some process knows; all processes call this.

    Args:
      texts: as many in every process; "" where this process does not know one.
    """
    if jax.process_count() == 1:
        return list(texts)
    width = int(_maximum(np.array([max(map(len, texts), default=0)], np.int32))[0])
    mine = "".join(text.ljust(width, "\0") for text in texts).encode("ascii")
    letters = _maximum(np.frombuffer(mine, np.uint8).astype(np.int32))
    whole = letters.astype(np.uint8).tobytes().decode("ascii")
    return [
        whole[at * width : (at + 1) * width].rstrip("\0") for at in range(len(texts))
    ]


def is_of_devices(error: BaseException) -> bool:
    """Whether the devices failed, as they do where another process is gone.

    On a CPU, a call whose collective fails at once raises a plain ValueError.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


class _Group:
    """The processes, as one of them sees the group.

    `maximum` takes the elementwise maximum of int32 vectors of equal length over all.
    """

    def __init__(
        self, index: int, count: int, maximum: Callable[[np.ndarray], np.ndarray]
    ):
        self._index, self._count, self._maximum = index, count, maximum

    def together(
        self, work: Callable[[], Value], facts: Callable[[Value], Facts]
    ) -> Value:
        result, failure, found = None, None, {}
        try:
            result = work()
            found = dict(facts(result))
        except Exception as error:
            failure = error
        self._require_success(failure, found)
        return result  # type: ignore[return-value]

    def _require_success(self, failure: Exception | None, found: Facts) -> None:
        statement = json.dumps(found, sort_keys=True)
        digest = np.frombuffer(hashlib.sha256(statement.encode()).digest(), np.int32)
        # The complement of the largest complement is the smallest value.
        mine = [*digest, *~digest, self._rank_if(failure is not None)]
        seen = self._maximum(np.array(mine, np.int32))
        largest, smallest = seen[: len(digest)], ~seen[len(digest) : -1]
        if seen[-1]:
            raise self._failure(self._count - int(seen[-1]), failure)
        if (largest != smallest).any():
            raise self._difference(statement)

    def _rank_if(self, flag: bool) -> int:
        """A number whose maximum tells the first process whose `flag` is set."""
        return (self._count - self._index) * flag

    def _failure(self, rank: int, own: Exception | None) -> Exception:
        """The error of process `rank`, after all have heard it."""
        code = own.exit_code if isinstance(own, UserError) else 0
        name = "" if isinstance(own, UserError) else f"{type(own).__name__}: "
        heard = json.loads(self.said_by(rank, json.dumps([code, f"{name}{own}"])))
        if own is not None:
            return own
        code, text = heard
        error = (UserError if code else LonelyError)(f"process {rank}: {text}")
        error.exit_code = code or error.exit_code
        return error

    def _difference(self, statement: str) -> UserError:
        """Compares the first process with the first one that differs from it."""
        first = self.said_by(0, statement)
        odd = self._maximum(np.array([self._rank_if(statement != first)], np.int32))
        rank = self._count - int(odd[0])
        ours, theirs = json.loads(first), json.loads(self.said_by(rank, statement))
        names = [x for x in sorted({*ours, *theirs}) if ours.get(x) != theirs.get(x)]
        lines = [f"  {x}: {ours.get(x)} and {theirs.get(x)}" for x in names]
        return UserError(
            f"processes 0 and {rank} of this run differ:\n" + "\n".join(lines) + "\n"
            "give all processes the same command, code, data and run directory"
        )

    def said_by(self, rank: int, text: str) -> str:
        """The ASCII `text` of process `rank`; all processes call this."""
        mine = text.encode("ascii") if self._index == rank else b""
        length = int(self._maximum(np.array([len(mine)], np.int32))[0])
        letters = np.zeros(-(-length // PIECE) * PIECE, np.int32)
        letters[: len(mine)] = np.frombuffer(mine, np.uint8)
        said = [self._maximum(each) for each in letters.reshape(-1, PIECE)]
        return b"".join(x.astype(np.uint8).tobytes() for x in said)[:length].decode()


def _maximum(values: np.ndarray) -> np.ndarray:
    """The elementwise maximum of int32 `values` over all processes, by their devices.

    Raises:
      LonelyError: another process is gone.
    """
    try:
        stacked = jax.make_array_from_callback(
            (jax.device_count(), *values.shape), _each_device(), lambda _: values[None]
        )
        return np.asarray(_largest()(stacked).addressable_data(0))
    except Exception as error:
        if not is_of_devices(error):
            raise
        first_line = str(error).partition("\n")[0]
        raise LonelyError(
            f"another process of this run is gone ({first_line}); its own output says "
            "why; the same command resumes the run"
        ) from error


@functools.cache
def _each_device() -> NamedSharding:
    devices = Mesh(np.array(jax.devices()), "all")
    return NamedSharding(devices, PartitionSpec("all"))


@functools.cache
def _largest() -> Any:
    everywhere = NamedSharding(_each_device().mesh, PartitionSpec())
    return jax.jit(lambda x: x.max(0), out_shardings=everywhere)
