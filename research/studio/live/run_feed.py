"""A stream of what happens in a run: one reader for all tabs that look at it."""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.data.grouped_values import by_group
from research.runs import metrics_file
from research.studio.live.metric_columns import TRAIN, Cursor, MetricColumns
from research.studio.page_errors import PageError

LOOK_EVERY, LOOK_ANYWAY = 1.0, 5.0  # seconds; the second without a change of files
PING_EVERY = 15.0  # seconds after which a silent stream says that it lives
# After a lost connection; a browser would wait for 3 seconds.
RETRY = b"retry: 1000\n\n"  # milliseconds
# A reader that is further behind reads the thinned curves again.
MOST_ROWS = 2000
MOST_LISTENERS = 1000  # A tab has one stream, of some 60 kB here.
FILES = ("run.json", metrics_file.NAME, "samples.jsonl", "complete.json")


def figures(
    columns: MetricColumns, steps: int, first: int = 0
) -> dict[str, float | None]:
    """The newest numbers of a run, and `eta_s`, the seconds until step `steps`.

    `first` is the step that the newest start began with.
    """
    train = columns.train(max(0, columns.cursor().train - 1))
    if not len(train["step"]):
        return {}
    found: dict[str, float | None] = {"step": int(train["step"][-1])}
    for name in TRAIN:
        found[name] = plain(train[name][-1])
    pace, left = columns.pace(first), steps - int(train["step"][-1])
    if pace is not None and left >= 0 and steps:
        found["eta_s"] = pace * left
    return found


def plain(value: float) -> float | None:
    """JSON has no number that is not finite."""
    return float(value) if math.isfinite(value) else None


def plain_list(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them."""
    return [plain(value) for value in values.tolist()]


@dataclasses.dataclass
class _Watch:
    """Shared by the listeners of one run."""

    columns: MetricColumns
    listeners: int = 0
    version: int = 0
    is_gone: bool = False
    state: str = "{}"
    told: object = None  # The end, state and presence that listeners know.
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    def tell(self) -> None:
        """Wakes all listeners."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()


class RunFeed:
    """Streams of runs. Belongs to one event loop."""

    def __init__(self, read_state: Callable[[Path, MetricColumns], dict[str, Any]]):
        """`read_state(folder, columns)` gives what a `state` event says."""
        self._read_state = read_state
        self._watches: dict[Path, _Watch] = {}
        self._is_ending = False
        self._listeners = 0

    def require_room(self) -> None:
        """Raises PageError: 503 so many tabs are open that one more is refused."""
        if self._listeners >= MOST_LISTENERS:
            raise PageError(
                503,
                f"too many tabs follow runs: there may be at most {MOST_LISTENERS:,}; "
                "close some, or load the page again for the figures of now",
            )

    def end(self) -> None:
        """Ends all streams soon, so that a server can stop; any thread may call it."""
        self._is_ending = True

    async def events(self, folder: Path, columns: MetricColumns, last: str):
        """Server-sent events from behind `last`, the id of the last one received.

        `rows`: new lines of `metrics.jsonl`. `state`: see `read_state`. `reset`: read
        the curves again, the file was replaced or is far ahead. `gone`: the run was
        moved or removed; nothing follows.
        """
        with self._watching(folder, columns) as watch:
            yield RETRY
            cursor, said, version = Cursor.parse(last), "", 0
            while True:
                while watch.version == version:  # At first until the first look.
                    try:
                        async with asyncio.timeout(PING_EVERY):
                            await watch.changed.wait()
                    except TimeoutError:
                        yield b": still here\n\n"
                version = watch.version
                if watch.is_gone:
                    yield _event("gone", "{}")
                    return
                if watch.task is None or watch.task.done():
                    return
                now = watch.columns.cursor()
                if cursor is None or _is_lost(cursor, now):
                    yield _event("reset", "{}", now)
                elif cursor != now:
                    yield _event("rows", _rows(watch.columns, cursor, now), now)
                cursor = now
                if watch.state != said:
                    said = watch.state
                    yield _event("state", said)

    @contextlib.contextmanager
    def _watching(self, folder: Path, columns: MetricColumns) -> Iterator[_Watch]:
        watch = self._watches.get(folder)
        if watch is None:
            watch = self._watches[folder] = _Watch(columns)
            watch.task = asyncio.create_task(self._follow(folder, watch))
            watch.task.add_done_callback(lambda _: watch.tell())
        watch.columns = columns  # Read a moment ago, so no listener is ahead of them.
        watch.listeners += 1
        self._listeners += 1
        try:
            yield watch
        finally:
            watch.listeners -= 1
            self._listeners -= 1
            if not watch.listeners:
                self._watches.pop(folder)
                if watch.task:
                    watch.task.cancel()

    async def _follow(self, folder: Path, watch: _Watch) -> None:
        seen: object = None
        while not watch.is_gone:
            # A trainer that is killed changes no file, so time alone is a reason, too.
            marks = await asyncio.to_thread(_marks, folder)
            marks.append(time.monotonic() // LOOK_ANYWAY)
            if self._is_ending:
                return
            if marks != seen:
                seen = marks
                await self._look(folder, watch)
            await asyncio.sleep(LOOK_EVERY)

    async def _look(self, folder: Path, watch: _Watch) -> None:
        def read() -> str:
            watch.columns.refresh()
            return json.dumps(self._read_state(folder, watch.columns))

        with contextlib.suppress(OSError):
            watch.state = await asyncio.to_thread(read)
        watch.is_gone = not os.path.isfile(folder / "config.json")
        now = (watch.columns.cursor(), watch.state, watch.is_gone)
        if watch.told != now:
            watch.told = now
            watch.tell()


def _marks(folder: Path) -> list[Any]:
    found: list[Any] = []
    for name in ("", *FILES, "requests", "lock.holder"):
        try:
            status = os.stat(folder / name)
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found


def _is_lost(cursor: Cursor, now: Cursor) -> bool:
    return (
        cursor.edition != now.edition
        or not 0 <= now.train - cursor.train <= MOST_ROWS
        or not 0 <= now.evals - cursor.evals <= MOST_ROWS
    )


def _rows(columns: MetricColumns, begin: Cursor, end: Cursor) -> str:
    train = columns.train(begin.train, end.train)
    found = {name: plain_list(values) for name, values in train.items()}
    evals = [
        {"step": line["step"], "losses": losses_of(line)}
        for line in columns.evals(begin.evals, end.evals)
    ]
    return json.dumps({"train": found, "evals": evals})


def losses_of(line: Mapping[str, Any]) -> dict[str, float | None]:
    """The held-out losses of an `eval` line, in all under "" and by group."""
    values = {"": line["loss"], **by_group(line, "loss")}
    return {name: plain(value) for name, value in values.items()}


def _event(kind: str, data: str, cursor: Cursor | None = None) -> bytes:
    number = f"id: {cursor}\n" if cursor else ""
    return f"event: {kind}\n{number}data: {data}\n\n".encode()
