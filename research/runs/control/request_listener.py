"""A job reads and answers the requests in its run directory.

The first process looks for request files, at most twice a second. All processes act on
a request at the same boundary between two steps. They agree through their devices: at
each boundary every process hands in one bit per kind of request, the devices take the
maximum, and every process reads the result one boundary later, after it has dispatched
the step in between. So no process waits, and the cost is one all-reduce of a few bytes
per step on any number of hosts. A job of one process needs none of this.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.runs.control.request_files import KINDS, ControlRequest, pending
from research.runs.utc_clock import utc_now

LOOK_EVERY = 0.5  # seconds

WriteAnswer = Callable[[dict[str, Any]], None]


class RequestListener:
    """The requests of one run, or of a pack of runs, while it trains.

    Leaving its context answers the requests that still wait: the run has ended.
    """

    def __init__(self, folders: Mapping[Path, WriteAnswer], mesh: Mesh):
        """Drops requests that were made to an earlier start.

        Args:
          folders: run directories, each with the function that writes an answer into
            the history of that run.
          mesh: the devices that carry the agreement of several processes.
        """
        self._folders = folders
        self._leader = jax.process_index() == 0
        self._looked = -math.inf
        self._vote = _Vote(mesh) if jax.process_count() > 1 else None
        # Requests that this process has handed in at the last boundary, and those that
        # are agreed on at this one. Only the first process has any.
        self._handed_in: list[tuple[Path, ControlRequest]] = []
        self._due: list[tuple[Path, ControlRequest]] = []
        self._known: set[str] = set()
        self._close_all(self._new(), None, "dropped: it was made before this start")

    def __enter__(self) -> "RequestListener":
        return self

    def __exit__(self, *_: object) -> None:
        self._looked = -math.inf
        waiting = [*self._due, *self._handed_in, *self._new()]
        self._due, self._handed_in = [], []
        self._close_all(waiting, None, "dropped: the run has ended")

    def agreed(self) -> frozenset[str]:
        """The kinds to act on at this boundary; the same in every process.

        Every process calls this once at each boundary, in the order of its steps.
        """
        new = self._new()
        kinds = frozenset(request.kind for _, request in new)
        if self._vote is None:
            self._due = new
            return kinds
        self._due, self._handed_in = self._handed_in, new
        return self._vote(kinds)

    def answer(self, step: int) -> None:
        """Answers the requests of this boundary: they were done after `step`."""
        due, self._due = self._due, []
        self._close_all(due, step, "done")

    def _new(self) -> list[tuple[Path, ControlRequest]]:
        """Requests that were not there at the last look; the first process looks."""
        moment = time.monotonic()
        if not self._leader or moment - self._looked < LOOK_EVERY:
            return []
        self._looked = moment
        new = [
            (folder, request)
            for folder in self._folders
            for request in pending(folder)
            if request.id not in self._known
        ]
        self._known |= {request.id for _, request in new}
        return new

    def _close_all(
        self, requests: list[tuple[Path, ControlRequest]], step: int | None, answer: str
    ) -> None:
        for folder, request in requests:
            fields = dataclasses.asdict(request)
            del fields["path"]
            more = {"answered_at": utc_now(), "step": step, "answer": answer}
            self._folders[folder](fields | more)
            # The answer is on disk first: a crash in between leaves a request that the
            # next start drops, and none without an answer.
            try:
                request.path.unlink(missing_ok=True)
            except OSError as error:  # Training matters more; `_known` holds it.
                logging.warning("an answered request stays: %s", error)


class _Vote:
    """Agreement of several processes through their devices, one boundary late."""

    def __init__(self, mesh: Mesh):
        every = PartitionSpec(mesh.axis_names)
        self._sharding = NamedSharding(mesh, every)
        self._shape = (mesh.devices.size, len(KINDS))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._maximum = jax.jit(lambda votes: votes.max(0), out_shardings=everywhere)
        self._last: jax.Array | None = None

    def __call__(self, flags: frozenset[str]) -> frozenset[str]:
        """Hands `flags` in, and returns what all handed in at the boundary before."""
        mine = np.array([[kind in flags for kind in KINDS]], np.int32)
        votes = jax.make_array_from_callback(
            self._shape, self._sharding, lambda _: mine
        )
        before, self._last = self._last, self._maximum(votes)
        if before is None:
            return frozenset()
        agreed = np.asarray(before.addressable_data(0))
        return frozenset(k for k, vote in zip(KINDS, agreed, strict=True) if vote)
