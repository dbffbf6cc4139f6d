"""SIGTERM and Ctrl-C in every phase of real runs, of one process and of two.

Each stops at one agreed step, saves it, says "start me again" within its grace, and is
started again: what it ends with is the unbroken run, byte for byte.
"""

import re
import signal
import time

import jax
import numpy as np
import pytest
from commands import chains
from kills import SAYS_PHASES, SLOW_DATA, torn
from process_pairs import start_pair
from run_results import check_equal, final_state, saved_state

from research.core.errors import PREEMPTED

# Seconds from the signal to the end: a step or an evaluation, and a save, of a model of
# nothing on a busy machine. JAX alone looks for a SIGTERM once a second.
GRACE = 30

# The file system does not answer when the fifth batch is waited for. After SAYS_PHASES.
READER_HANGS = """
import time
from research.data import batch_order
make = batch_order.OrderedBatches.__init__
def hanging(self, numbers, rows_of, *rest):
    asked = []
    def rows(wanted):
        asked.append(wanted)
        if {seconds} and len(asked) == 5:
            while count["data"] < 5:  # Batches are read ahead.
                time.sleep(0.01)
            time.sleep({seconds})
        return rows_of(wanted)
    make(self, numbers, rows, *rest)
batch_order.OrderedBatches.__init__ = hanging
"""

# When the signal comes. A first step is compiled after the first batch has come;
# the second evaluation is the first one between steps. `data` never comes to anybody;
# `late` it comes to the first of two processes, when the other has begun the step.
MOMENTS = {
    "start": "",
    "compile": "phase compile 2",
    "data": "phase data 5",
    "late": "phase data 5",
    "step": "phase step 5",
    "evaluate": "phase evaluate 2",
    "save": "phase save 1",
}


def send_to(running, moment, number):
    """Sends it at the `moment` of the first process; returns how each ended, and when.

    SIGTERM reaches the last process only, as when one machine is taken away; a terminal
    sends Ctrl-C to all.
    """
    if moment == "start":
        running[0].wait_for("(data|text): ")
    else:
        running[0].wait_for(MOMENTS[moment])
    if moment in ("data", "late"):
        time.sleep(1)  # Until the others wait, too.
    sent = time.monotonic()
    for process in running if number == signal.SIGINT else running[-1:]:
        process.send(number)
    ended = [process.finish() for process in running]
    return ended, time.monotonic() - sent


def programs_of(count, moment):
    hanging = {"data": [1000] * count, "late": [6] + [0] * (count - 1)}
    # Two hear of a SIGTERM after a second or two, when twelve quick steps are over.
    slow = SLOW_DATA if count == 2 else ""
    return {
        rank: SAYS_PHASES + slow + READER_HANGS.format(seconds=seconds)
        for rank, seconds in enumerate(hanging.get(moment, [0] * count))
    }


def signalled(place, results, count, moment, number):
    """A run that gets the signal, and the same command again.

    Returns:
      How each process ended, when that was, the steps that were saved by then, and how
      the second ones ended.
    """
    results("unbroken" if count == 1 else "two_processes")
    run = name_of(count, moment, number)

    def start(programs):
        if count == 2:
            return start_pair(place, run, programs=programs)
        where = ("--config=config.py", f"--config.run_dir=runs/{run}")
        return [place.start("train", *where, program=programs.get(0, ""))]

    ended, seconds = send_to(start(programs_of(count, moment)), moment, number)
    kept = place.saved_steps(run)
    return ended, seconds, kept, [process.finish() for process in start({})]


def name_of(count, moment, number):
    return f"{moment}-{signal.Signals(number).name}-{count}"


CASES = [
    (count, moment, number)
    for count in (1, 2)
    for moment in MOMENTS
    for number in (signal.SIGTERM, signal.SIGINT)
    # A lone process has nothing to save there, and none to wait for.
    if count == 2 or moment not in ("start", "late")
]
stopped_runs = chains(
    "stopped_runs",
    {
        name_of(*case): (lambda place, results, c=case: signalled(place, results, *c))
        for case in CASES
    },
)


def check_goes_on(place, run, stopped, last, unbroken):
    """All stopped at one step, which is returned, and `last` ended what they began."""
    assert [x.code for x in stopped] == [PREEMPTED] * len(stopped), stopped[0].err
    (step,) = re.findall(r"stopped after step (\d+), which is saved", stopped[0].err)
    assert [x.code for x in last] == [0] * len(last), last[0].err
    assert f"step {step} restored" in last[0].err
    check_equal(place, run, unbroken)
    assert torn(place.run_dir(run) / "checkpoints") == []
    return int(step)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_a_signal_saves_one_step_and_the_run_goes_on(place, stopped_runs, case):
    count, moment, _ = case
    run = name_of(*case)
    ended, seconds, kept, last = stopped_runs(run)
    unbroken = "unbroken" if count == 1 else "two-processes"
    step = check_goes_on(place, run, ended, last, unbroken)
    assert step == kept[-1]
    # A batch that comes to nobody is not waited for; a step that has begun is.
    assert moment != "data" or step == 4
    assert moment != "late" or step > 4
    print(f"{run}: saved step {step}, all ended {seconds:.1f} s after the signal")
    assert seconds < GRACE
    state = final_state if count == 1 else state_bytes
    assert state(place, run) == state(place, unbroken)


def state_bytes(place, run):
    """The bytes of the last checkpoint's arrays."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(saved_state(place, run))]
