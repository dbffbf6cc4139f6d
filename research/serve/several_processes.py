"""A server over the devices of several processes: the first listens, others follow."""

import logging
import signal
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from research.config.knob_groups import RuntimeConfig
from research.core.errors import UserError
from research.parallel import agreement, runtime


def join(flags: Any) -> bool:
    """Joins the other processes; whether there are any.

    Args:
      flags: a dataclass, which must be equal in all of them.

    Raises:
      UserError: they cannot be joined, or have other flags.
    """
    runtime.start(RuntimeConfig(distributed=True))
    if jax.process_count() == 1:
        return False
    facts = {f"--{name}": str(value) for name, value in vars(flags).items()}
    _or_abandon(lambda: agreement.together(lambda: None, lambda _: facts))
    return True


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

    _or_abandon(work)
    runtime.leave(0)


def _or_abandon(work: Callable[[], Any]) -> None:
    try:
        work()
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        runtime.abandon(error, code)


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
