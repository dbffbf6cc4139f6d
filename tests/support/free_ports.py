"""Ports that stay free between the choice of a number and the server's start.

Linux gives programs that ask for any port those from 32768 on; these lie below.
"""

import contextlib
import random

from research.core.errors import UserError
from research.serve.http.sockets import open_port

_given = set()


def open_kept_port():
    """A socket that listens at a port which nobody here was given before."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        if port not in _given:
            with contextlib.suppress(UserError):  # Another process listens there.
                listener = open_port("127.0.0.1", port)
                _given.add(port)
                return listener


def free_port():
    """A number at which nobody listens."""
    with open_kept_port() as listener:
        return listener.getsockname()[1]
