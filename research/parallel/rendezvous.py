"""Processes count themselves before they join: every number must be there once.

JAX ends a process by SIGABRT, with a C++ stack and without a number, if a process is
missing or a number was given twice. So the first process listens at its address until
all have come, and tells them what it found. Then JAX's own service takes the port.
"""

import contextlib
import errno
import json
import os
import resource
import socket
import time

from research.core.errors import LonelyError, UserError
from research.parallel.process_discovery import Processes

HELLO_TIME = 5.0  # seconds that a guest has to say who it is
LINE_BYTES = 4096  # longest hello and verdict
PORT_TIME = 20.0  # seconds in which process 0 must get a port that is in use
LINGER = 2.0  # seconds in which processes that come later hear of an error, too
RETRY = 0.2  # seconds between two tries to reach the first process
# Open files of process 0: its own, and links of the others, to it here and then to
# JAX's service.
OWN_FILES, FILES_OF_ANOTHER = 256, 2


def meet(processes: Processes, patience: float) -> None:
    """Returns once all processes are there, each number once.

    Raises:
      UserError: a number was given twice, the processes disagree on how many they are,
        the port cannot be used, or process 0 may not open enough files.
      LonelyError: some have not come within `patience` seconds; names their numbers.
    """
    deadline = time.monotonic() + patience
    port_deadline = min(deadline, time.monotonic() + PORT_TIME)
    if processes.index == 0:
        _allow_files(processes.count)
    code, text = 0, None
    while text is None:
        if processes.index == 0 and (listener := _listen(processes)):
            with listener:
                code, text = _count(listener, processes, deadline)
        elif processes.index == 0:
            # A second process 0 gets its verdict from the first. A program that is none
            # of ours has none to give.
            heard = _introduce(processes, port_deadline)
            if heard is None and time.monotonic() > port_deadline:
                raise UserError(
                    f"process 0 cannot listen at {processes.address}: another program "
                    "uses the port; choose another in the address of the first process"
                )
            code, text = heard or (0, None)
        else:
            heard = _introduce(processes, deadline)
            if heard is None and time.monotonic() > deadline:
                raise LonelyError(
                    f"process 0 does not answer at {processes.address} within "
                    f"{patience:g} s: it is missing, its number was given twice, or "
                    "the address leads elsewhere"
                )
            code, text = heard or (0, None)
    if code:
        raise (LonelyError if code == LonelyError.exit_code else UserError)(text)


def _allow_files(count: int) -> None:
    """Raises this process's limit of open files to what so many processes need.

    Raises:
      UserError: the system does not allow it.
    """
    needed = OWN_FILES + FILES_OF_ANOTHER * count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise UserError(
            f"process 0 of {count} needs {needed:,} open files, and this system allows "
            f"{hard:,} at most ({error}): raise the hard limit (ulimit -Hn) of the "
            "first machine"
        ) from error


def _listen(processes: Processes) -> socket.socket | None:
    """A listener at the port of the first process; None if another process has it."""
    port = int(processes.address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=processes.count,
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise UserError(
            f"process 0 cannot listen at port {port} ({error}); choose another in the "
            "address of the first process"
        ) from error


def _count(
    listener: socket.socket, processes: Processes, deadline: float
) -> tuple[int, str]:
    """The exit code and message for all processes, who have then heard them."""
    names = {0: _name()}
    with contextlib.ExitStack() as stack:
        links: list[socket.socket] = []
        verdict = (0, "")
        while len(names) < processes.count:
            try:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                link = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                verdict = verdict if verdict[0] else _missing(names, processes)
                break
            try:
                link.settimeout(HELLO_TIME)
                index, count, name = _hello(link.makefile("rb").readline(LINE_BYTES))
            except (OSError, ValueError, TypeError, RecursionError):
                continue  # A stranger.
            links.append(link)
            if not verdict[0]:
                verdict = _judge(names, processes, index, count, name)
                if verdict[0]:
                    deadline = min(deadline, time.monotonic() + LINGER)
            names.setdefault(index, name)
        for link in links:
            with contextlib.suppress(OSError):  # It is gone, and JAX will notice.
                link.sendall(json.dumps(verdict).encode() + b"\n")
    return verdict


def _hello(line: bytes) -> tuple[int, int, str]:
    """Number, count and name of a guest. Raises ValueError for a stranger's line."""
    index, count, name = json.loads(line)
    if (type(index), type(count), type(name)) != (int, int, str):
        raise ValueError("not a hello")
    if not 0 <= index < count:
        raise ValueError("not a number of a process")
    return index, count, name


def _missing(names: dict[int, str], processes: Processes) -> tuple[int, str]:
    absent = [i for i in range(processes.count) if i not in names]
    listed = ", ".join(map(str, absent[:9])) + (" ..." if len(absent) > 9 else "")
    return LonelyError.exit_code, (
        f"{len(absent)} of {processes.count} processes have not come to "
        f"{processes.address} in time: numbers {listed}; see their own output"
    )


def _judge(
    names: dict[int, str], processes: Processes, index: int, count: int, name: str
) -> tuple[int, str]:
    if count != processes.count:
        return UserError.exit_code, (
            f"process 0 ({names[0]}) expects {processes.count} processes, and process "
            f"{index} ({name}) expects {count}: give all the same number"
        )
    if index in names:
        return UserError.exit_code, (
            f"two processes have the number {index}: {names[index]}, and {name}; "
            f"number {count} processes from 0 to {count - 1}, each once"
        )
    return 0, ""


def _introduce(processes: Processes, deadline: float) -> tuple[int, str] | None:
    """The verdict of the first process; None if it does not answer now."""
    host, _, port = processes.address.rpartition(":")
    hello = json.dumps([processes.index, processes.count, _name()]).encode() + b"\n"
    left = max(deadline - time.monotonic(), HELLO_TIME)
    try:
        address = (host.strip("[]"), int(port))
        with socket.create_connection(address, timeout=left) as link:
            link.sendall(hello)
            code, text = json.loads(link.makefile("rb").readline(LINE_BYTES))
            return int(code), str(text)
    except (OSError, ValueError, TypeError, RecursionError):
        time.sleep(RETRY)
        return None


def _name() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
