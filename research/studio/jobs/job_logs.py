"""The output of a job: a file beside its run directory, as a sweep's are."""

import os
from pathlib import Path

LONGEST = 1500  # letters of a message


def log_of(run: Path) -> Path:
    """The file with the output of the jobs that train in `run`."""
    return run.with_name(f"{run.name}.log")


def last_error(log: str) -> str:
    """The last message of a command in a log, with its remedy; empty without one."""
    begin = log.rfind("\nerror: ") + 1
    if not begin and not log.startswith("error: "):
        return ""
    return log[begin:][:LONGEST].strip()


def tail(path: Path, size: int) -> str:
    """The last `size` bytes of a log; empty where there is none, or a link.

    A line that a progress bar has written again and again is shown in its last state.
    """
    try:
        if path.is_symlink():
            return ""
        with path.open("rb") as file:
            skipped = max(0, os.fstat(file.fileno()).st_size - size)
            file.seek(skipped)
            text = file.read(size).decode(errors="replace")
    except OSError:
        return ""
    lines = text.replace("\r\n", "\n").split("\n")
    if skipped and lines[1:]:  # The first one is cut, perhaps within a letter.
        del lines[0]
    return "\n".join(line.rpartition("\r")[2] for line in lines)
