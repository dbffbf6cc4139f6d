"""The sockets that a server listens on, and the line that says where."""

import errno
import getpass
import os
import socket
import stat
from pathlib import Path

from research.core.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Milliseconds after which the system ends a connection whose client reads nothing.
UNREAD = 120_000
BACKLOG = 2048


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError: the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        used = getattr(error, "errno", None) == errno.EADDRINUSE
        cause = "another process listens there" if used else str(error)
        raise UserError(
            f"--host={host} --port={port} cannot be used: {cause}; choose another "
            "port, or --port=0 for any free one"
        ) from error
    return listener


def open_unix_socket(path: Path) -> socket.socket:
    """A socket file that only this user can open. Raises UserError: it cannot be made.

    A file that a dead server has left is replaced.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise UserError(f"--uds={path} exists and is no socket")
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(path)) == 0:
                    raise UserError(f"--uds={path}: another process listens there")
            path.unlink()
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"--uds={path} cannot be made: {error}") from error
    except UserError:
        listener.close()
        raise
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """`http://HOST:PORT` of a socket of `open_port`."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


def tunnel_to(listener: socket.socket) -> str:
    """The command that leads a port of another machine to `listener`."""
    port = listener.getsockname()[1]
    there = f"{getpass.getuser()}@{socket.gethostname()}"
    return f"ssh -L {port}:localhost:{port} {there}"
