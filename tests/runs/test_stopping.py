"""A signal is noted between steps, raised elsewhere, and never lost."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from commands import ROOT
from waiting import PATIENCE, wait_until

from research.core.errors import INTERRUPTED, PREEMPTED
from research.runs.control import os_signals
from research.runs.control.os_signals import Preempted, StopRequest
from research.runs.phase_timer import PhaseTimer


@pytest.fixture
def phases():
    return PhaseTimer()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_of_the_loop_is_raised_at_once(stop, number):
    with pytest.raises(Preempted, match=number.name):
        send(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_loop_is_noted(stop, phases, number):
    with stop.noting():
        for phase in ("compile", "step", "evaluate", "save"):
            phases.enter(phase)
            stop.signal = None
            assert not stop.is_due()
            if number != signal.SIGINT or phase == "compile":  # A second one ends.
                send(number)
                assert stop.is_due() and stop.signal == number


def test_nohup_keeps_its_meaning(phases):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(phases) as stop:
            send(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_breaks_off_a_wait_for_data(stop, phases):
    with stop.noting(), pytest.raises(Preempted), phases.during("data"):
        sender = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -TERM {os.getpid()}"])
        with sender:
            time.sleep(PATIENCE)
    assert phases.name == "start"


def test_a_signal_before_the_wait_for_data_is_not_waited_with(stop, phases):
    with stop.noting():
        assert not stop.is_due()
        send(signal.SIGTERM)
        with pytest.raises(Preempted), phases.during("data"):
            stop.wait(lambda: pytest.fail("waited"))


class Service:
    """Tell several processes the moment to stop, as JAX's own service does."""

    def __init__(self):
        self.asked, self.agreed, self._lock = [], None, threading.Lock()

    def reached_preemption_sync_point(self, moment):
        with self._lock:
            self.asked.append(moment)
            return moment == self.agreed

    def notice(self, *others):
        """One past the last moment that any process has asked about."""
        with self._lock:
            self.agreed = max([self.asked[-1], *others]) + 1


@pytest.fixture
def service(monkeypatch):
    found = Service()
    monkeypatch.setattr(os_signals, "multihost_utils", found)
    monkeypatch.setattr(os_signals.jax, "process_count", lambda: 2)
    return found


def test_several_processes_hear_of_a_closed_terminal_by_the_service(service, phases):
    """JAX's service knows no signal but SIGTERM."""
    heard = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: heard.set())
    try:
        with StopRequest(phases) as stop:
            send(signal.SIGHUP)
            # A signal that another thread has taken does not end a long wait here.
            wait_until(heard.is_set)
            assert stop.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGTERM, before)


def test_every_process_asks_about_every_moment(service, phases):
    """However long its waits for data are: none can leap over the agreed one."""
    with StopRequest(phases) as stop:
        for seconds in (0, 1.5, 0):
            assert not stop.is_due()
            assert stop.wait(lambda seconds=seconds: time.sleep(seconds) or 7) == 7
    assert service.asked == list(range(3 * os_signals.MOMENTS + 1))


def test_a_wait_in_which_all_stand_is_broken_off(service, phases):
    with StopRequest(phases) as stop:
        assert not stop.is_due()
        sender, comes = threading.Timer(0.5, service.notice), threading.Event()
        sender.start()
        with pytest.raises(Preempted):
            stop.wait(lambda: comes.wait(PATIENCE))
        comes.set()
    assert stop.signal == signal.SIGTERM


def test_a_batch_for_a_step_that_another_has_begun_is_waited_for(service, phases):
    with StopRequest(phases) as stop:
        assert not stop.is_due()

        def pull():
            wait_until(lambda: len(service.asked) > 3)  # Two of them in this wait.
            service.notice(1 + os_signals.MOMENTS)
            return "late"

        assert stop.wait(pull) == "late"
        assert not stop.is_due(), "the other one has asked about this moment"
        with pytest.raises(Preempted):
            stop.wait(lambda: "never used")


IMPORTS_FOR_EVER = """
import runpy, sys, time
class Finder:
    def find_spec(self, name, *_):
        if name == "jax":
            print("importing", flush=True)
            time.sleep(1000)
sys.meta_path.insert(0, Finder())
runpy.run_module({module!r}, {{}}, "__main__", True)
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [("train", signal.SIGTERM), ("train.together", signal.SIGHUP)],
)
def test_a_signal_before_a_run_listens_asks_to_be_resumed(module, number):
    program = IMPORTS_FOR_EVER.format(module=f"research.{module}")
    flags = ["--config=configs/finetune_dolly.py"]
    flags += ['--runs=[{"run_dir": "runs/a"}]'] * (module == "train.together")
    with subprocess.Popen(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout.readline() == b"importing\n"
            child.send_signal(number)
            assert child.wait(PATIENCE) == PREEMPTED
        finally:
            child.kill()
        said = child.stderr.read().decode()
        assert f"stopped by {number.name}" in said
        assert "the same command resumes the run" in said


HANGING_READER = """
import concurrent.futures, sys, time
from research.parallel import runtime
concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 1000)
sys.stdout.write("the last words")
runtime.leave(75)
"""


def test_nobody_waits_for_a_reader_that_hangs(place):
    done = place.start_fork(HANGING_READER).finish()
    assert done.code == PREEMPTED and done.out == "the last words"


HELD = """
import hashlib, sys
from research.runs.phase_timer import PhaseTimer
from research.runs.control.os_signals import StopRequest

with StopRequest(PhaseTimer()) as stop, stop.noting():
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    # Python runs no handler before this C call returns, in minutes.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_the_second_interrupt_ends_a_process_that_is_held_in_a_c_call(place):
    child = place.start_fork(HELD)
    child.wait_for("ready")
    time.sleep(0.2)
    child.send(signal.SIGINT)
    assert not child.wait(0.5)
    # The kernel keeps one of two that come while it is stopped.
    wait_until(lambda: child.send(signal.SIGINT) or child.wait(0.5))
    done = child.finish()
    assert done.code == INTERRUPTED and "stopped at once" in done.err
