"""Processes that tests start: what they say while they run, and how they end."""

import contextlib
import dataclasses
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from waiting import PATIENCE


@dataclasses.dataclass(frozen=True)
class Finished:
    """A process that has ended; `out` and `err` are its two streams."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A process whose two streams are read while it runs.

    Args:
      process: a `subprocess.Popen` with three pipes, or a `Fork`.
    """

    def __init__(self, process):
        self._begun = time.monotonic()
        self._process = process
        # The tests in this process have the first right to a core: all end together.
        with contextlib.suppress(ProcessLookupError):  # A fork may end before this.
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)
        self.allow(2 * PATIENCE)
        self._streams = {"out": self._process.stdout, "err": self._process.stderr}
        self._said = {"out": [], "err": []}
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(name,)) for name in self._streams
        ]
        for reader in self._readers:
            reader.start()

    def allow(self, seconds):
        """Kills it after so many seconds from now, and not when it was said before."""
        if guard := getattr(self, "_guard", None):
            guard.cancel()
        self._guard = threading.Timer(seconds, self._process.kill)
        self._guard.start()

    def _read(self, name):
        for line in self._streams[name]:
            with self._news:
                self._said[name].append(line.decode())
                self._news.notify_all()

    def wait_for(self, said, seconds=2 * PATIENCE):
        """Until a line of standard error matches, it has ended, or time is over."""
        over = time.monotonic() + seconds
        with self._news:
            seen = 0
            while time.monotonic() < over:
                lines = self._said["err"]
                if any(re.match(said, line) for line in lines[seen:]):
                    return
                seen = len(lines)
                self._news.wait(0.05)
                if self._process.poll() is not None and len(lines) == seen:
                    return

    def wait(self, seconds):
        """Whether it has ended within so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def children(self):
        """Processes it has started, first to last."""
        return psutil.Process(self._process.pid).children()

    def send(self, number):
        self._process.send_signal(number)

    def finish(self, stdin=""):
        """Waits for its end."""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(stdin.encode())
                self._process.stdin.close()
            self._process.wait()
        finally:
            self._process.kill()
            self._guard.cancel()
        for reader in self._readers:
            reader.join()
        for stream in self._streams.values():
            stream.close()
        seconds = time.monotonic() - self._begun
        out, err = ("".join(self._said[name]) for name in ("out", "err"))
        return Finished(self._process.returncode, out, err, seconds)


class Fork:
    """A command in a fork of `forking.py`: what `Running` uses of `subprocess.Popen`.

    Args:
      files: our ends of its standard streams, and of where its process id and its exit
        code can be read.
    """

    def __init__(self, files):
        stdin, stdout, stderr, status = files
        self.stdin = os.fdopen(stdin, "wb")
        self.stdout, self.stderr = os.fdopen(stdout, "rb"), os.fdopen(stderr, "rb")
        # Without a buffer, `select` sees all that can still be read.
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid, self.returncode = int(self._status.readline()), None

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """`forking.py`, which is started when the first command asks for a fork."""

    def __init__(self, env):
        self._env, self._lock, self._socket = env, threading.Lock(), None

    def start(self, **request):
        """Returns the `Fork` of a request, see `forking.py`."""
        pairs = [os.pipe() for _ in range(4)]
        ours = [pairs[0][1], *(read for read, _ in pairs[1:])]
        theirs = [pairs[0][0], *(write for _, write in pairs[1:])]
        with self._lock:
            if not self._socket:
                self._begin()
            socket.send_fds(self._socket, [json.dumps(request).encode()], theirs)
        for file in theirs:
            os.close(file)
        return Fork(ours)

    def _begin(self):
        # A packet is a request.
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            program = Path(__file__).with_name("forking.py")
            self._process = subprocess.Popen(
                [sys.executable, program, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self._env,
                pass_fds=[its.fileno()],
            )

    def close(self):
        if self._socket:
            self._socket.close()
            self._process.wait()
