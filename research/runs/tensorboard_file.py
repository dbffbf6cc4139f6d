"""The points of a run for TensorBoard, written by the thread that calls.

tensorboardX's own `SummaryWriter` has a thread and a queue of ten events. Its thread
dies at the first error of the disk, and the training then waits for the queue for ever.
"""

import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FLUSH_EVERY = 30.0  # seconds
JUDGED_BY = ("eval/loss", "train/loss")  # beside the hyperparameters of a run


class TensorBoard:
    """An event file. Points are a copy of the metrics: without a disk they are dropped.

    After an error nothing is written until the next start, and a warning says so.
    """

    def __init__(self, folder: Path, first_step: int, settings: Mapping[str, Any]):
        """Opens a new file in `folder`; hides older points after `first_step`.

        `settings` are the hyperparameters that TensorBoard compares runs by.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = folder
        self._file: Any = None
        self._flushed = time.monotonic()
        with self._dropped_on_error():
            self._file = self._open()
            self._add(Event(file_version="brain.Event:2"))
            hidden_from = first_step + 1 if first_step else 0
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=hidden_from, session_log=start))
            for summary in _hyperparameters(settings):
                self._add(Event(summary=summary))

    def _open(self) -> Any:
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(exist_ok=True)
        # TensorBoard looks for this form. Nanoseconds, because a rollback opens another
        # file at once.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        return RecordWriter(str(self._folder.absolute() / name))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the points of `step`, by their tags."""
        if self._file is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        # As they are: `tensorboardX.summary.scalar` gives "a b" and "a_b" one tag.
        points = [Summary.Value(tag=x, simple_value=values[x]) for x in values]
        with self._dropped_on_error():
            self._add(Event(step=step, summary=Summary(value=points)))
            if time.monotonic() - self._flushed > FLUSH_EVERY:
                self._flushed = time.monotonic()
                self._file.flush()

    def close(self) -> None:
        """Writes the points that are still buffered."""
        if self._file is not None:
            with self._dropped_on_error():
                file, self._file = self._file, None
                file.close()

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logging.warning(
                "TensorBoard gets no more points from this start: %s; metrics.jsonl "
                "has them all",
                error,
            )
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


def _hyperparameters(settings: Mapping[str, Any]) -> Iterator[Any]:
    """The summaries that TensorBoard's HPARAMS tab reads: it knows no tuples."""
    if settings:
        from tensorboardX.summary import hparams

        plain = {
            name: value if isinstance(value, str | bool | int | float) else str(value)
            for name, value in settings.items()
        }
        yield from hparams(plain, dict.fromkeys(JUDGED_BY))
