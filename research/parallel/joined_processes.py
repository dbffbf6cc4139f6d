"""Commands over the devices of several processes, which join, and end together."""

import sys
from collections.abc import Callable
from typing import Any

import jax

from research.config.knob_groups import RuntimeConfig
from research.core.errors import INTERRUPTED, UserError
from research.parallel import agreement, runtime


def join(flags: Any) -> bool:
    """Joins the other processes; whether there are any.

    Args:
      flags: a dataclass, which must be equal in all of them.

    Raises:
      UserError: they cannot be joined, or have other flags.
    """
    runtime.start(RuntimeConfig(distributed=True), ahead=True)
    if jax.process_count() == 1:
        return False
    facts = {f"--{name}": str(value) for name, value in vars(flags).items()}
    or_abandon(lambda: agreement.together(lambda: None, lambda _: facts))
    return True


def or_abandon(work: Callable[[], Any]) -> None:
    """Calls `work`; after an error, this process ends without waiting for others."""
    try:
        work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        runtime.abandon(SystemExit(), INTERRUPTED)
    except SystemExit as ended:
        runtime.abandon(ended, ended.code if isinstance(ended.code, int) else 1)
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        runtime.abandon(error, code)
