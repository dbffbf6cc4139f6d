"""Paths that a user writes: `~` is the home folder, and an address is no path."""

import os
import re
from pathlib import Path

from research.core.errors import UserError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
STEP = re.compile(r"(?P<run>.+)@(?P<step>latest|best|[0-9]+)")


def split_step(written: str) -> tuple[str, str]:
    """The folder of a run and the step in `RUN@STEP`; "" where no step is named.

    An address, and a path that exists as it is written, name no step.
    """
    found = STEP.fullmatch(written)
    known = os.path.exists(os.path.expanduser(written))
    if not found or known or ADDRESS.match(written):
        return written, ""
    return found["run"], found["step"]


# A path, or each of several with commas between them.
FIRST_PARTS = re.compile(r"(^\s*|,\s*)(~[^/,]*)")


def expanded(written: str) -> str:
    """`written`, where a `~` that begins a path is the home folder.

    All knobs and flags that take paths pass through here. Addresses, words and the home
    of an unknown user stay as they are.
    """
    return FIRST_PARTS.sub(lambda x: x[1] + os.path.expanduser(x[2]), written)


def listed_paths(written: str, folder: Path = Path()) -> list[str]:
    """The paths of a knob that takes one, or several with commas between them.

    One whose name has a comma, and that is there below `folder`, is one path.
    """
    if "," not in written or os.path.exists(folder / expanded(written)):
        return [written]
    return [part.strip() for part in written.split(",")]


def local_path(written: str | Path, name: str = "a path") -> Path:
    """The path of a file or folder on this machine.

    Args:
      written: by the user.
      name: of the knob or flag, for messages.

    Raises:
      UserError: it is an address such as `gs://bucket/folder`, or the home folder of an
        unknown user.
    """
    if ADDRESS.match(str(written)):
        raise UserError(
            f"{name} is {written}, an address and no folder here; mount the storage "
            "(for example with gcsfuse), or copy the files, and give the path"
        )
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} is {written}: {error}") from error
