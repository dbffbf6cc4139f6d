"""Servers of models that pages start: one process each, described by files.

The folder `servers/NAME` has `server.json` (command, process, address), `keys`, which
only this user may read, and `log`. The process is no child that ends with the studio,
so a studio that starts again finds it. A server that was started by hand is listed if
somebody writes such a folder: `{"port": 8000}` is enough, and `"uds"` is the path of a
Unix socket instead; `"key_file"` names its keys.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.core.json_files import NUMBER, mismatch, read_json
from research.runs.utc_clock import utc_now
from research.studio.jobs.job_commands import serving
from research.studio.page_errors import not_found

FILE, KEYS, LOG, LOCK = "server.json", "keys", "log", "lock"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PORT = re.compile(r"[0-9]{1,5}")
FIRST_PORT, LAST_PORT = 8701, 8899
REMEDY = "repair it, or remove its folder after you have stopped its process"
SHAPE = {
    **dict.fromkeys(("uds", "key_file", "began", "by"), str),
    **{"port": int, "pid": int, "born": NUMBER, "command": list | tuple},
}
# Flags of `research.serve` that a page may set. All others are the studio's own.
FLAGS = (
    *("run", "model", "slots", "context", "adapters", "rank", "weights", "queue"),
    *("prefix_mib", "grace", "port", "adapters_from"),
)


@dataclasses.dataclass(frozen=True)
class ModelServer:
    """A server, as its file tells it.

    Attributes:
      name: of its folder.
      folder: with its files.
      command: its argv; empty where it was started by hand.
      port: of 127.0.0.1; 0 where it listens on a Unix socket.
      uds: path of this socket, or "".
      key_file: keys, one a line; "" where it needs none.
      pid, born: of the process, and when the system started it (a pid returns); 0
        where they are not known.
      began: ISO 8601, or "".
      by: who started it.
      problem: why its file cannot be read; then the rest is empty.
    """

    name: str
    folder: Path
    command: tuple[str, ...] = ()
    port: int = 0
    uds: str = ""
    key_file: str = ""
    pid: int = 0
    born: float = 0.0
    began: str = ""
    by: str = ""
    problem: str = ""

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.folder / LOG

    @property
    def endpoint(self) -> str:
        """The address for clients on this machine."""
        return self.uds or f"http://127.0.0.1:{self.port}/v1"

    @property
    def process(self) -> psutil.Process | None:
        """Its process, if that runs."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid) if self.pid else None
            if (
                found is not None
                and found.create_time() == self.born
                and found.status() != psutil.STATUS_ZOMBIE
            ):
                return found
        return None

    def key(self) -> str:
        """The first key that may also change adapters, else the first one, or "".

        A key that is kept as its digest cannot be used.

        Raises:
          OSError: the file of keys cannot be read.
          ValueError: it is no ASCII text, so no header can hold its keys.
        """
        if not self.key_file:
            return ""
        lines = Path(self.key_file).read_text(encoding="utf-8").splitlines()
        found = [f" {line}".partition(" #")[0].split() for line in lines]
        keys = [x for x in found if x and not x[-1].startswith("sha256:")]
        admins = [words for words in keys if words[0] == "admin"]
        key = (admins or keys or [[""]])[0][-1]
        return key.encode("ascii").decode()


class ModelServers:
    """The servers of a folder; two studios with one root share them."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        # Whoever has started a process must read how it ended.
        self._children: list[subprocess.Popen[bytes]] = []

    def all(self) -> list[ModelServer]:
        """All servers, the one that began last first."""
        self._children = [x for x in self._children if x.poll() is None]
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        found = [self._read(x) for x in names if (self._folder / x / FILE).is_file()]
        return sorted(found, key=lambda server: server.began, reverse=True)

    def find(self, name: str) -> ModelServer:
        """A server by its name. Raises PageError: there is none."""
        if not NAME.fullmatch(name) or not (self._folder / name / FILE).is_file():
            raise not_found(f"there is no server {name[:80]!r}")
        self._children = [x for x in self._children if x.poll() is None]
        return self._read(name)

    def command(self, name: str, flags: Sequence[str]) -> list[str]:
        """The command with which `start` would start a server now.

        Raises:
          UserError: the name or a flag cannot be used.
        """
        if not NAME.fullmatch(name):
            raise UserError(
                f"{name[:80]!r} is no name for a server; use letters, digits and ._-"
            )
        for word in flags:
            flag = word.partition("=")[0].removeprefix("--")
            if not word.startswith("--") or "=" not in word or flag not in FLAGS:
                known = ", ".join(f"--{x}=" for x in FLAGS)
                raise UserError(f"{word[:80]!r} is no flag for this; there are {known}")
        own = [word for word in flags if not word.startswith("--port=")]
        return serving(own, self._port(name, flags), self._folder / name / KEYS)

    def start(self, name: str, flags: Sequence[str], by: str) -> ModelServer:
        """Starts a server; one of this name that has ended is replaced.

        Its keys stay what they were, so that clients need no new ones.

        Args:
          name: of the server.
          flags: of `research.serve`, of `FLAGS`; paths are the caller's to check.
          by: who starts it.

        Raises:
          UserError: a server of this name runs, or `command` refuses.
        """
        with self._locked():
            words = self.command(name, flags)
            folder = self._folder / name
            if (folder / FILE).is_file() and self._read(name).process:
                raise UserError(f"the server {name} runs already: stop it first")
            folder.mkdir(exist_ok=True)
            self._make_key(folder / KEYS)
            server = ModelServer(
                name,
                folder,
                tuple(words),
                self._port(name, flags),
                key_file=str(folder / KEYS),
                began=utc_now(),
                by=by,
            )
            self._write(server)  # If the studio is killed here, its port is known.
            with open(server.log, "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *words[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # It outlives the studio and its terminal.
                )
            self._children.append(process)
            born = psutil.Process(process.pid).create_time()
            server = dataclasses.replace(server, pid=process.pid, born=born)
            self._write(server)
        return server

    def stop(self, name: str) -> ModelServer:
        """Sends SIGTERM: answers that run come to their end, the second ends them.

        Raises:
          PageError: there is no such server.
          UserError: it does not run, or its process is not known.
        """
        server = self.find(name)
        process = server.process
        if process is None:
            cause = (
                "does not run any more"
                if server.pid
                else "was started by hand: end its process where it was started"
            )
            raise UserError(f"the server {name} {cause}")
        process.send_signal(signal.SIGTERM)
        return server

    def remove(self, name: str) -> ModelServer:
        """Removes the files of a server that has ended.

        Raises:
          PageError: there is no such server.
          UserError: it runs.
        """
        with self._locked():
            server = self.find(name)
            if server.process:
                raise UserError(f"the server {name} runs: stop it first")
            shutil.rmtree(server.folder)
        return server

    def _read(self, name: str) -> ModelServer:
        folder = self._folder / name
        if folder.is_symlink() or not NAME.fullmatch(name):
            return ModelServer(name, folder, problem="it is a link, or no usable name")
        try:
            found: dict[str, Any] = read_json(folder / FILE, {}, REMEDY)
            fields = {
                field.name: found[field.name]
                for field in dataclasses.fields(ModelServer)
                if field.name in found and field.name not in ("name", "folder")
            }
            server = ModelServer(name, folder, **fields)
            return _checked(server)
        except UserError as error:
            return ModelServer(name, folder, problem=str(error))

    def _write(self, server: ModelServer) -> None:
        fields = dataclasses.asdict(server)
        del fields["name"], fields["folder"], fields["problem"]
        write_whole(server.folder / FILE, json.dumps(fields, indent=1))

    def _make_key(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w", encoding="ascii") as file:
                file.write(f"admin {secrets.token_urlsafe(32)}\n")

    def _port(self, name: str, flags: Sequence[str]) -> int:
        """The port of the flags, or that this name has had, or the first free one."""
        for word in flags:
            given = word.partition("--port=")[2]
            if PORT.fullmatch(given) and 0 < int(given) < 1 << 16:
                return int(given)
            if given:
                raise UserError(f"--port={given[:20]} is no port from 1 to 65535")
        known = {server.name: server.port for server in self.all()}
        if known.get(name):
            return known[name]
        for port in range(FIRST_PORT, LAST_PORT + 1):
            if port not in known.values() and _is_free(port):
                return port
        raise UserError(f"no port from {FIRST_PORT} to {LAST_PORT} is free")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / LOCK, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _checked(server: ModelServer) -> ModelServer:
    """`server`, if its fields have their types. Raises UserError."""
    problem = mismatch({name: getattr(server, name) for name in SHAPE}, SHAPE)
    if not problem and not (server.uds or 0 < server.port < 1 << 16):
        problem = "no port"
    if not problem and not 0 <= server.pid < 1 << 31:
        problem = "no pid"
    if not problem and "\0" in server.uds + server.key_file:
        problem = "no path"
    if problem:
        raise UserError(f"{server.folder / FILE} cannot be used ({problem}); {REMEDY}")
    return dataclasses.replace(server, command=tuple(map(str, server.command)))


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
