"""A run that hangs is ended with its stacks, whatever the disk does."""

import pytest
from waiting import PATIENCE

from research.core.errors import STUCK

HANGING = """
import sys, time
from research.runs.control import watchdog
from research.runs.phase_timer import PhaseTimer

watchdog.PATIENCE = {patience}

def tell(cause):
    sys.stderr.write(f"told: {{cause}}\\n")
    sys.stderr.flush()
    {disk}

def wait_for_a_dead_peer():
    time.sleep(1000)

phases = PhaseTimer()
phases.enter("step")
with watchdog.Watchdog(phases, 0.3, 7, tell):
    wait_for_a_dead_peer()
"""


@pytest.mark.parametrize(
    ("disk", "patience"),
    [
        ("pass", PATIENCE),
        ("time.sleep(1000)", 0.5),
        ("raise OSError(28, 'No space left on device')", PATIENCE),
    ],
)
def test_a_process_that_hangs_ends_though_its_disk_hangs_too(place, disk, patience):
    done = place.start_fork(HANGING.format(disk=disk, patience=patience)).finish()
    assert done.code == STUCK, done.err
    assert "error: process 7 has hung in phase 'step'" in done.err
    assert "in wait_for_a_dead_peer" in done.err, "the stack does not say where"
    # A disk that hangs is not waited for, and may not have heard of it.
    assert patience < 1 or "told: process 7 has hung" in done.err
    assert ("No space left" in done.err) == ("OSError" in disk)
