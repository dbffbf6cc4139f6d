"""Decides from a trainer's exit code whether to start it again.

`research/core/errors.py` defines the exit codes. An error that a person must fix is
final. A preemption never counts as a failure. Every other end is tried a few times.
"""

import signal

from research.core.errors import (
    PREEMPTED,
    STOPPED,
    DamagedError,
    DivergedError,
    SaveError,
    UserError,
)

# 130 is a person's Ctrl-C before there was anything to save. Whoever stops a run does
# not want it to be started again.
FINAL = {
    0,
    130,
    STOPPED,
    *(kind.exit_code for kind in (UserError, DivergedError, SaveError, DamagedError)),
}


def worst(codes: list[int]) -> int:
    """The most telling exit code of processes that ended together.

    A final error comes first, then any other failure, then a preemption.
    """
    final = [code for code in codes if code in FINAL and code != 0]
    failed = [code for code in codes if code not in (0, PREEMPTED)]
    return next(iter([*final, *failed, *(c for c in codes if c)]), 0)


def describe(code: int) -> str:
    """`code 3`, or `signal SIGKILL` for a process that a signal has killed."""
    if code >= 0:
        return f"code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # A real-time signal has no name.
        return f"signal {-code}"


def again(code: int, failures_left: int) -> bool:
    """Whether to start the trainer again."""
    return code == PREEMPTED or (code not in FINAL and failures_left > 0)
