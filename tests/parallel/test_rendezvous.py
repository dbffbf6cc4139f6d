"""Every number is there once, or all processes hear which one is not."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from free_ports import free_port
from waiting import PATIENCE, wait_until

from research.core.errors import LonelyError, UserError
from research.parallel import rendezvous, runtime
from research.parallel.process_discovery import Processes
from research.parallel.rendezvous import meet


def met(indices, count, patience=PATIENCE, counts=None, before=lambda place: None):
    """How each process of `indices` ends, in order; `before` it is called."""
    address = f"localhost:{free_port()}"

    def one(place):
        before(place)
        given = (counts or [count] * len(indices))[place]
        try:
            meet(Processes(address, given, indices[place], "test"), patience)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, range(len(indices))))


@pytest.fixture
def judged(monkeypatch):
    """The guests that process 0 has heard so far."""
    heard, judge = [], rendezvous._judge
    monkeypatch.setattr(
        rendezvous, "_judge", lambda *given: (judge(*given), heard.append(given))[0]
    )
    return heard


def test_all_that_are_there_may_join():
    assert met([2, 0, 3, 1], 4) == [None] * 4


@pytest.fixture
def few_files():
    """This process may open eight files more, until it allows itself more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 8, before[1]))
    yield held
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_processes_than_the_usual_limit_of_open_files(few_files):
    """A usual limit is 1,024, and 4,096 chips of v5p have as many hosts."""
    assert met(range(16), 16) == [None] * 16


def test_a_limit_of_open_files_that_cannot_be_raised_is_named():
    code = (
        "import resource, sys\n"
        "from research.core.errors import UserError\n"
        "from research.parallel.process_discovery import Processes\n"
        "from research.parallel.rendezvous import meet\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "try:\n"
        "    meet(Processes('localhost:1', 64, 0, 'test'), 0.1)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "needs 384 open files, and this system allows 300" in said


@pytest.mark.parametrize("indices", [[0, 1, 1], [1, 0, 0], [0, 0]])
def test_a_number_given_twice_is_named_at_once(indices, judged, monkeypatch):
    """Not when the patience with the missing ones is over."""
    monkeypatch.setattr(rendezvous, "LINGER", 0.3)
    twice, guests = max(indices, key=indices.count), {*indices} - {0}

    def before(place):
        # The last process, whose number is the second one, comes to all others.
        if place == len(indices) - 1:
            wait_until(lambda: len(judged) == len(guests))

    for error in met(indices, 3, before=before):
        assert type(error) is UserError
        assert f"two processes have the number {twice}" in str(error)


def test_missing_numbers_are_named_in_time(judged, monkeypatch):
    # When number 2 has come, the patience of number 0 ends.
    clock = SimpleNamespace(sleep=time.sleep)
    clock.monotonic = lambda: time.monotonic() + 2 * PATIENCE * len(judged)
    monkeypatch.setattr(rendezvous, "time", clock)
    for error in met([0, 2], 4):
        assert type(error) is LonelyError and error.exit_code == 6
        assert "2 of 4 processes have not come" in str(error)
        assert "numbers 1, 3;" in str(error)


def test_a_missing_first_process_is_named_in_time():
    (error,) = met([1], 2, patience=0.3)
    assert type(error) is LonelyError
    assert "process 0 does not answer at localhost:" in str(error)


def test_processes_that_were_told_of_other_numbers_are_refused():
    for error in met([0, 1], 2, counts=[2, 3]):
        assert type(error) is UserError
        assert "expects 2 processes, and process 1 (" in str(error)


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\n",
        b'[[1],2,"x"]\n',
        b'["1",2,"x"]\n',
        b'[true,2,"x"]\n',
        b'[5,2,"x"]\n',
        b'[-1,2,"x"]\n',
        b"[1,2,3]\n",
        b"[" * 4000 + b"\n",
        b"[" * 200_000,
        b"\xff\n",
    ],
)
def test_a_stranger_at_the_port_holds_nobody_up(hello):
    address = f"localhost:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, Processes(address, 2, 0, "test"), PATIENCE)
        port = int(address.rpartition(":")[2])

        def connected():
            with contextlib.suppress(OSError):
                return socket.create_connection(("localhost", port))

        with wait_until(connected) as stranger:
            stranger.sendall(hello)
            meet(Processes(address, 2, 1, "test"), PATIENCE)
        assert first.result() is None


def test_a_port_that_another_program_uses_is_named_soon(monkeypatch):
    monkeypatch.setattr(rendezvous, "PORT_TIME", 0.3)
    monkeypatch.setattr(rendezvous, "HELLO_TIME", 0.1)
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(UserError, match="another program uses the port") as raised:
            meet(Processes(address, 2, 0, "test"), 4.0)
    assert address in str(raised.value) and raised.value.exit_code == 2


def test_a_process_that_jax_lets_wait_ends_with_a_sentence(monkeypatch, capsys):
    """Where JAX finds the address by itself, nobody has met before."""
    codes = []
    monkeypatch.setattr(runtime.os, "_exit", codes.append)
    with runtime._answered_within(0.05):
        wait_until(lambda: codes)
    assert codes == [LonelyError.exit_code]
    assert "a number was given twice" in capsys.readouterr().err
    with runtime._answered_within(PATIENCE):
        pass
    threads = threading.enumerate
    wait_until(lambda: not any(isinstance(x, threading.Timer) for x in threads()))
    assert len(codes) == 1
