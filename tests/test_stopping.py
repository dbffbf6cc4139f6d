"""A signal is noted between steps, raised elsewhere, and never lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT

from research.phases import Phases
from research.stopping import INTERRUPTED, Preempted, StopRequest


@pytest.fixture
def phases():
    return Phases()


@pytest.fixture
def stop(phases):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest(phases) as request:
        yield request
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def send(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # The handler runs between two of these.
        pass


class Dropped:
    def __del__(self):
        send(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_destructor_is_raised_later(stop):
    stop.raise_if_lost()
    Dropped()
    with pytest.raises(KeyboardInterrupt):
        stop.raise_if_lost()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_the_loop_is_raised_at_once(stop, number):
    with pytest.raises(Preempted, match=number.name):
        send(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_loop_is_noted(stop, phases, number):
    with stop.noting():
        for phase in ("compile", "step", "evaluate", "save"):
            phases.enter(phase)
            stop.signal = None
            assert not stop.is_due(3)
            if number == signal.SIGTERM or phase == "compile":  # A second one ends.
                send(number)
                assert stop.is_due(4) and stop.signal == number


def test_a_signal_breaks_off_a_wait_for_data(stop, phases):
    begun = time.monotonic()
    with stop.noting(), pytest.raises(Preempted), phases.during("data"):
        sender = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -TERM {os.getpid()}"])
        with sender:
            time.sleep(30)
    assert time.monotonic() - begun < 10
    assert phases.name == "start"


HELD = """
import hashlib
from research.phases import Phases
from research.stopping import StopRequest

with StopRequest(Phases()) as stop, stop.noting():
    print("ready", flush=True)
    # Python runs no handler before this C call returns, in minutes.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
"""


def test_the_second_interrupt_ends_a_process_that_is_held_in_a_c_call():
    with subprocess.Popen(
        [sys.executable, "-c", HELD],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.readline()
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == INTERRUPTED
        assert b"stopped at once" in child.stderr.read()
