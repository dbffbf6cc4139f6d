"""A run that hangs is ended with its stacks, whatever the disk does."""

import subprocess
import sys
import time

import pytest
from commands import ROOT

from research.core.errors import STUCK

HANGING = """
import sys, time
from research.runs.steering import watchdog
from research.runs.phase_timer import PhaseTimer

watchdog.PATIENCE = 0.5

def tell(cause):
    sys.stderr.write(f"told: {{cause}}\\n")
    sys.stderr.flush()
    {disk}

def wait_for_a_dead_peer():
    time.sleep(60)

phases = PhaseTimer()
phases.enter("step")
with watchdog.Watchdog(phases, 0.3, 7, tell):
    wait_for_a_dead_peer()
"""


@pytest.mark.parametrize(
    "disk", ["pass", "time.sleep(60)", "raise OSError(28, 'No space left on device')"]
)
def test_a_process_that_hangs_ends_though_its_disk_hangs_too(disk):
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING.format(disk=disk)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == STUCK, done.stderr
    assert time.monotonic() - begun < 30
    assert "error: process 7 has hung in phase 'step'" in done.stderr
    assert "in wait_for_a_dead_peer" in done.stderr, "the stack does not say where"
    assert "told: process 7 has hung" in done.stderr
    assert ("No space left" in done.stderr) == ("OSError" in disk)
