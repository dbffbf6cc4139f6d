"""A run that hangs is ended with its stacks, whatever the disk does."""

import pytest

from research.core.errors import STUCK

HANGING = """
import sys, time
from research.runs.control import watchdog
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
def test_a_process_that_hangs_ends_though_its_disk_hangs_too(place, disk):
    done = place.start_fork(HANGING.format(disk=disk)).finish()
    assert done.code == STUCK, done.err
    assert done.seconds < 30
    assert "error: process 7 has hung in phase 'step'" in done.err
    assert "in wait_for_a_dead_peer" in done.err, "the stack does not say where"
    assert "told: process 7 has hung" in done.err
    assert ("No space left" in done.err) == ("OSError" in disk)
