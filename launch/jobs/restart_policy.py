"""Which ends of a trainer are worth starting it again.

The exit codes are the trainer's (`research/errors.py`). Whatever a person must mend is
final; a preemption costs nothing, and every other end is tried a few times.
"""

from research.core.errors import (
    PREEMPTED,
    STOPPED,
    DamagedError,
    DivergedError,
    SaveError,
    UserError,
)

# 130: a person's Ctrl-C before there was anything to save. A person who asks a run to
# stop does not want it started again.
FINAL = {
    0,
    130,
    STOPPED,
    *(kind.exit_code for kind in (UserError, DivergedError, SaveError, DamagedError)),
}


def worst(codes: list[int]) -> int:
    """The exit code that says most of processes that ended together.

    A process that ends another's hang says less than the one that failed.
    """
    final = [code for code in codes if code in FINAL and code != 0]
    failed = [code for code in codes if code not in (0, PREEMPTED)]
    return next(iter([*final, *failed, *(c for c in codes if c)]), 0)


def again(code: int, failures_left: int) -> bool:
    """Whether to start once more."""
    return code == PREEMPTED or (code not in FINAL and failures_left > 0)
