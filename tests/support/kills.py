"""Meets a training in a phase of its work, and stops or kills it there."""

import random
import re
import signal
import types

from commands import chain, step_line

# Before a command: it says which phase it enters, and how often it has. Data is so slow
# that a signal can meet the wait for it.
SAYS_PHASES = """
import collections, sys, time
from research.runs import phase_timer
enter, count = phase_timer.PhaseTimer.enter, collections.Counter()
def told(self, name):
    enter(self, name)
    count[name] += 1
    sys.stderr.write(f"phase {name} {count[name]}\\n")
    sys.stderr.flush()
    time.sleep(0.02 * (name == "data"))
phase_timer.PhaseTimer.enter = told
"""

# So that a signal after a step finds the run before its last one; two processes hear of
# a SIGTERM after a second or two.
SLOW_DATA = """
import time
from research.train.programs import device_batches
pull = device_batches.DeviceBatches.__next__
def pull_late(self):
    time.sleep(0.3)
    return pull(self)
device_batches.DeviceBatches.__next__ = pull_late
"""

# From the fourth batch on a training waits, 20 seconds at most each time, until its run
# directory has a request. It looks for requests twice a second.
WAITS_FOR_REQUESTS = """
import pathlib, time
from research.train.programs import device_batches
pull = device_batches.DeviceBatches.__next__
def pull_late(self):
    over = time.monotonic() + 20
    if self.number > 1:
        time.sleep(0.6)
        while not [*pathlib.Path().glob("runs/{run}/requests/*.json")]:
            if time.monotonic() > over:
                break
            time.sleep(0.05)
    return pull(self)
device_batches.DeviceBatches.__next__ = pull_late
"""

# Its saves take long enough to be met.
SLOW_DISK = """
import time
from research.checkpoints import checksums
seal = checksums.seal
def slow(folder):
    time.sleep(0.2)
    seal(folder)
checksums.seal = slow
"""


def ask(place, run, *kinds):
    """Requests something of a running job, one kind after another."""
    return [place.run("runs", kind, f"--run=runs/{run}") for kind in kinds]


@chain
def broken(place, results):
    """Asked to save and to sample, stopped by SIGTERM, killed in a save, and finished.

    The starts are `stopped`, `killed` and `last`; `answers` are those to the requests.
    """
    results("unbroken")  # Its compiled programs are in the cache.
    flags = place.train_flags("broken")
    waits = WAITS_FOR_REQUESTS.format(run="broken")
    stopped = place.start("train", *flags, program=waits)
    stopped.wait_for(step_line(1))
    answers = ask(place, "broken", "checkpoint", "sample")
    stopped.send(signal.SIGTERM)
    stopped = stopped.finish()
    killed = place.start("train", *flags, program=SLOW_DISK)
    wait_for_a_save(killed, place.run_dir("broken") / "checkpoints")
    killed.send(signal.SIGKILL)
    return types.SimpleNamespace(
        answers=answers,
        stopped=stopped,
        killed=killed.finish(),
        last=place.train("broken"),
    )


# In turn: at a random moment of the start, in a phase, and in a half-written save.
AIMS = ("start", "compile", "step", "half", "evaluate", "data", "save")


def kill_again_and_again(place, flags, kills, *, seed=0):
    """Trains with `flags`, killed `kills` times, and then to the end.

    Returns:
      How each start ended; all but the last one were killed.
    """
    generator, ended = random.Random(seed), []
    (where,) = [f.partition("=")[2] for f in flags if f.startswith("--config.run_dir=")]
    checkpoints = place.folder / where / "checkpoints"
    for number in range(kills):
        process = place.start("train", *flags, program=SAYS_PHASES + SLOW_DISK)
        _meet(process, AIMS[number % len(AIMS)], generator, checkpoints)
        process.send(signal.SIGKILL)
        ended.append(process.finish())
        short = f"kill {number + 1} of {kills} came too late: the run is too short"
        assert ended[-1].code == -signal.SIGKILL, f"{short}\n{ended[-1].err}"
    return [*ended, place.run("train", *flags)]


def _meet(process, aim, generator, checkpoints):
    if aim == "start":
        process.wait_for("phase step", generator.uniform(0.5, 8.0))
    elif aim == "half":
        wait_for_a_save(process, checkpoints)
    else:
        # Far enough that some saves are committed, and the next start resumes from one.
        # Two steps are saved at a time; a step enters its phase twice.
        often = {
            "compile": 2,  # The first is left for an evaluation or the first batch.
            "data": generator.randint(1, 8),
            "step": generator.randint(1, 16),
            "evaluate": generator.randint(1, 2),
            "save": generator.randint(1, 3),
        }[aim]
        process.wait_for(f"phase {aim} {often}")
        process.wait(generator.uniform(0.0, 0.01 if aim == "data" else 0.2))


def phase_of(finished):
    """The one it was in when it ended; `start` before it said any."""
    return (["start", *re.findall(r"^phase (\w+)", finished.err, re.M)])[-1]


def wait_for_a_save(process, checkpoints):
    """Until a folder is half written, or the process has ended."""
    while not process.wait(0.002):
        if torn(checkpoints):
            return


def torn(checkpoints):
    """Return the folders of saves that were broken off or still run."""
    return list(checkpoints.glob("*.orbax-checkpoint-tmp*"))
