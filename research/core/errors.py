"""Errors that a message explains, and the exit codes of all commands.

| code | error | meaning |
|---|---|---|
| 0 | | done |
| 1 | ParityError | not done: a plan does not fit, no answer, or an export is wrong |
| 2 | UserError | a flag, a file or the config is wrong |
| 3 | DivergedError | a loss, a gradient norm or parameters are not finite |
| 4 | SaveError | a file could not be written |
| 5 | DamagedError | checkpoints are damaged |
| 6 | LonelyError, UnreachableError, watchdog | no progress, or another is gone |
| 7 | | stopped by a request, and saved |
| 75 | | stopped by a signal, and resumable |
| 130 | | interrupted |
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
# Below this share of common letters (`difflib`), a suggestion would only mislead.
LIKENESS = 0.65
STOPPED = 7  # Stopped by a request and saved: the same command resumes the run.
STUCK = 6  # No progress, or another process is gone.
PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal; the same command resumes the run.
INTERRUPTED = 130  # 128 + SIGINT, as shells say it.
ENDS_WELL = (0, STOPPED, PREEMPTED, INTERRUPTED)


class UserError(ValueError):
    """An error that the user can fix: what was requested, what was found, what to do.

    The commands print its message without a traceback and exit with `exit_code`. Any
    other exception is a bug of ours and keeps its traceback.
    """

    exit_code = 2


class LonelyError(UserError):
    """The other processes of a run do not answer; a later try may succeed."""

    exit_code = STUCK


class UnreachableError(UserError):
    """The hub stopped answering; what is done is kept, and a later try may succeed."""

    exit_code = STUCK


class DivergedError(UserError):
    """The run cannot continue: a number is not finite, or nothing is learnt.

    Attributes:
      step: the updates made, the one that did it included.
      batch: number of the batch without which the run may try again; None where no
        single batch is to blame.
    """

    exit_code = 3

    def __init__(self, message: str, step: int, batch: int | None):
        super().__init__(message)
        self.step = step
        self.batch = batch


class SaveError(UserError):
    """Files that belong to `step` could not be written to disk.

    Attributes:
      step: None for an export by command.
    """

    exit_code = 4

    def __init__(self, message: str, step: int | None):
        super().__init__(message)
        self.step = step


@contextlib.contextmanager
def files_of_step(step: int | None, what: str) -> Iterator[None]:
    """Turns an OSError of the body into a SaveError: `what` could not be written."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{what} could not be written: {error}; make room or give back the right "
            "to write, then start the same command again",
            step,
        ) from error


class ParityError(UserError):
    """Written files compute something else than the model that they were made of."""

    exit_code = 1


class DamagedError(UserError):
    """A checkpoint is damaged, and no intact one can take its place."""

    exit_code = 5


def closest(word: str, known: Iterable[str], likeness: float = LIKENESS) -> str:
    """The one of `known` that is most like `word`; empty if none is like it."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return found[0] if found else ""


def refuse(faults: Sequence[str]) -> None:
    """Raises one UserError that names all `faults`; without any, nothing happens."""
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} things are wrong:", *faults]))


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of `table` for `name`, which is the value of `what`.

    Raises:
      UserError: there is none; the message lists those that there are.
    """
    if name not in table:
        listed = ", ".join(filter(None, table))
        raise UserError(
            f"{what} is {name!r}{nearest(name, table)}; it must be one of {listed}"
            f"{', or not given at all' if '' in table else ''}"
        )
    return table[name]


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or nothing."""
    near = closest(word, known)
    return f" (did you mean {near!r}?)" if near else ""
