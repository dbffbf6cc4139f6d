"""The launcher of this machine ends where its processes hang, and says how they end."""

import contextlib
import logging
import signal
import sys

import psutil
import pytest
from waiting import PATIENCE

from launch.jobs import restart_policy
from launch.jobs.launch_job import LaunchPlan
from launch.targets import local
from launch.targets.local import ProcessGroup

SLEEPS = "import time; time.sleep(1000)"


def plan(*programs):
    return LaunchPlan({}, [[sys.executable, "-S", "-c", x] for x in programs])


@pytest.mark.parametrize(
    ("ends", "code"),
    [("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_waits_for_a_dead_process_is_killed(
    ends, code, place, monkeypatch, caplog
):
    """Wherever it stands in the list; the code is that of the one that failed."""
    monkeypatch.setattr(local, "PATIENCE", 0.3)
    caplog.set_level(logging.INFO)
    programs = [SLEEPS, SLEEPS]
    programs.insert(place, ends)
    with ProcessGroup() as group:
        assert group.train(plan(*programs), restarts=0) == code
    said = restart_policy.describe(code)
    assert f"process {place} has ended with {said}" in caplog.text
    assert caplog.text.count("is killed") == 2


def test_the_children_of_a_killed_process_are_killed_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "PATIENCE", 0.3)
    file = tmp_path / "pid"
    parent = (
        "import os, time, pathlib\n"
        f"pid, file = os.fork(), pathlib.Path({str(file)!r})\n"
        "if pid:\n"
        "  file.with_suffix('.part').write_text(str(pid))\n"
        "  file.with_suffix('.part').rename(file)\n"
        "time.sleep(1000)"
    )
    fails = (
        "import os, sys, time\n"
        f"while not os.path.exists({str(file)!r}): time.sleep(0.01)\n"
        "sys.exit(3)"
    )
    with ProcessGroup() as group:
        assert group.train(plan(parent, fails), restarts=0) == 3
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(file.read_text()))
        if child.status() != psutil.STATUS_ZOMBIE:
            child.wait(PATIENCE)


def test_a_launcher_that_fails_leaves_no_process_behind():
    def broken():
        raise ZeroDivisionError

    with ProcessGroup() as group, pytest.raises(ZeroDivisionError):
        group.train(plan(SLEEPS), restarts=0, watch=broken)
    (process,) = group._running
    assert process.wait(PATIENCE) == -signal.SIGTERM
    assert not psutil.pid_exists(process.pid)


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ProcessGroup() as group:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert group.last_signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_codes_of_children_are_told_by_name():
    assert restart_policy.describe(3) == "code 3"
    assert restart_policy.describe(-9) == "signal SIGKILL"
    assert restart_policy.describe(-40) == "signal 40"
