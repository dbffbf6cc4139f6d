"""The output of a job: a file, for trainings beside the run directory, as a sweep's."""

import os
import re
from pathlib import Path

LONGEST = 1500  # letters of a message
# How far a door says it is: `12 of 40 rows`, `step 12/40`.
COUNT = re.compile(r"\b(\d+)(?: of (\d+) \w|/(\d+)\b)")


def log_of(run: Path) -> Path:
    """The file with the output of the jobs that train in `run`."""
    return run.with_name(f"{run.name}.log")


def last_error(log: str) -> str:
    """The last message of a command in a log, with its remedy; empty without one."""
    begin = log.rfind("\nerror: ") + 1
    if not begin and not log.startswith("error: "):
        return ""
    return log[begin:][:LONGEST].strip()


def progress(log: str) -> tuple[int, int] | None:
    """The last count in a log: how many of how many; None without one."""
    found = COUNT.findall(log)
    if not found:
        return None
    done, *total = map(int, filter(None, found[-1]))
    return (done, total[0]) if 0 < total[0] >= done else None


def tail(path: Path, size: int, begin: int = 0) -> str:
    """The last `size` bytes of a log; empty where there is none, or a link.

    Nothing before the byte `begin` is read.

    A line that a progress bar has written again and again is shown in its last state.
    """
    try:
        if path.is_symlink():
            return ""
        with path.open("rb") as file:
            skipped = max(begin, os.fstat(file.fileno()).st_size - size)
            file.seek(skipped)
            text = file.read(size).decode(errors="replace")
    except OSError:
        return ""
    lines = text.replace("\r\n", "\n").split("\n")
    if skipped > begin and lines[1:]:  # The first one is cut, perhaps within a letter.
        del lines[0]
    return "\n".join(line.rpartition("\r")[2] for line in lines)
