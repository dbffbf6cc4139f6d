"""The memory that this process may use where the machine has more."""

import contextlib
import math
from pathlib import Path, PurePosixPath


def memory_limit(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float:
    """The bytes that a container or job may use; infinite without a limit.

    A limit of any group above the process's own counts, too. A line of `groups` is
    `0::/path` in version 2 of control groups, and `N:memory:/path` in version 1, whose
    memory controller has a folder of its own (Linux, cgroups(7)).
    """
    limits = [math.inf]
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # No such system.
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mount / "memory" if controllers else mount
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            # A container may not see the groups above its own.
            with contextlib.suppress(OSError, ValueError):
                limits.append(
                    float((top / group / name).read_text().replace("max", "inf"))
                )
    return min(limits)
