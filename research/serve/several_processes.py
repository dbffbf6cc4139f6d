"""A server over the devices of several processes: the first listens, others follow."""

import logging
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from research.parallel import agreement, runtime
from research.parallel.joined_processes import or_abandon


def serve_together(
    listen: Callable[[], Any], lead: Callable[[Any], None], follow: Callable[[], None]
) -> NoReturn:
    """Ends this process when the first one has served; an error of one ends all.

    Args:
      listen: is called by the first process; none starts where it fails.
      lead: is called by the first process with the result of `listen`.
      follow: is called by the others.
    """
    first = jax.process_index() == 0

    def work() -> None:
        listener = agreement.together(lambda: listen() if first else None)
        if first:
            lead(listener)
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _explain)
            follow()

    or_abandon(work)
    runtime.leave(0)


def _explain(number: int, frame: object) -> None:
    """A launcher signals all processes, and answers still run: the first one ends."""
    name, rank = signal.Signals(number).name, jax.process_index()
    logging.warning(
        "process %d got %s: it ends with process 0, which has to get it, too; again, "
        "and this one ends at once",
        rank,
        name,
    )
    signal.signal(number, signal.SIG_DFL)
