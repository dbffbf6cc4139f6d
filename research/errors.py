"""The one exception a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong: says what was asked, found, and to change.

    The doors (`train.py`, `generate.py`) print its message without a traceback and
    exit with code 2. Anything else that is raised is a bug of ours and keeps its
    traceback.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
