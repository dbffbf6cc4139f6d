"""A training writes to any standard stream: closed, full, held, or without letters."""

import errno
import os
import subprocess
import sys
import time

import pytest
from commands import ROOT
from doors import run_door

from research.config import command_line
from research.core import standard_streams
from research.core.standard_streams import _LossyFile

SAYS = """
import os, sys
from research.core import standard_streams
standard_streams.keep_open(0.1)
print("häl\\ud800lo", flush=True)
sys.stderr.write("to standard error: ä\\n")
assert os.open(os.devnull, os.O_RDONLY) > 2, "a file has taken the place of a stream"
lost = standard_streams.lost_output()
os._exit(10 + lost.errno if lost else 10)
"""


def says(shell_end, **more):
    """How `SAYS` ends when the shell starts it with `shell_end`, and its output."""
    command = f'"$0" -c "$1" {shell_end}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, SAYS],
        cwd=ROOT,
        env=os.environ | more,
        capture_output=True,
    )
    return done.returncode - 10, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (">/dev/full", errno.ENOSPC),
        (">/dev/full 2>/dev/full", errno.ENOSPC),
        (">&- 2>&- <&-", 0),
    ],
)
def test_output_that_cannot_be_written_is_dropped(end, why):
    code, _, err = says(end)
    assert code == why, err
    assert "Traceback" not in err


def test_a_console_without_a_letter_shows_its_number():
    code, out, err = says("", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (code, out) == (0, "h\\xe4l\\ud800lo\n"), err
    assert err == "to standard error: \\xe4\n"


def test_a_reader_that_is_gone_is_no_error():
    read, write = os.pipe()
    os.close(read)
    file = _LossyFile(write, None)
    assert file.write(b"lost") == 4 and file.failure.errno == errno.EPIPE
    os.close(write)


def test_a_reader_that_has_stopped_is_not_waited_for_again():
    read, write = os.pipe()
    file = _LossyFile(write, 0.2)
    begun, given = time.monotonic(), 0
    while given < 1 << 22:  # Far more than a pipe holds, in 800 parts.
        given += file.write(b"x" * 5000)
    assert 0.2 < time.monotonic() - begun < 400 * 0.2
    assert file.failure.errno == errno.EAGAIN
    while len(os.read(read, 1 << 20)) == 1 << 20:
        pass
    assert file.write(b"heard") == 5 and os.read(read, 10) == b"heard"
    os.close(read)
    os.close(write)


def test_lost_results_are_an_error_and_a_lost_log_is_none(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(standard_streams, "lost_output", lambda: full)
    done = run_door(lambda argv: 0, tmp_path, "plan")
    assert done.returncode == 4 and "No space left" in done.stderr
    assert run_door(lambda argv: 3, tmp_path, "plan").returncode == 3
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda argv: 0, prints_results=False)
    assert not ended.value.code


def test_a_child_that_a_signal_has_killed_ends_as_shells_say(tmp_path):
    assert run_door(lambda argv: -9, tmp_path, "launch").returncode == 137
