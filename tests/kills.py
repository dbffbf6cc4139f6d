"""Kills a training at random moments, and in the middle of a save, until it is done."""

import random
import signal

# Before a command: its saves take long enough to be met.
SLOW_DISK = """
import time
from research.saving import integrity
seal = integrity.seal
def slow(folder):
    time.sleep(0.2)
    seal(folder)
integrity.seal = slow
"""


def kill_again_and_again(place, flags, kills, *, seed=0):
    """Trains with `flags`, killed `kills` times, and then to the end.

    In turn a kill falls at a random moment of the start (imports, loading, compiling,
    the first evaluation), shortly after a step, and into a save.

    Returns:
      How each start ended.
    """
    generator, ended = random.Random(seed), []
    (where,) = [f.partition("=")[2] for f in flags if f.startswith("--config.run_dir=")]
    for number in range(kills):
        process = place.start("train", *flags, program=SLOW_DISK)
        if number % 3 == 0:
            process.wait(generator.uniform(0.5, 8.0))
        elif number % 3 == 1:
            process.wait_for(r"step +\d+/")
            process.wait(generator.uniform(0.0, 0.3))
        else:
            wait_for_a_save(process, place.folder / where / "checkpoints")
        process.send(signal.SIGKILL)
        ended.append(process.finish())
    return [*ended, place.run("train", *flags)]


def wait_for_a_save(process, checkpoints):
    """Until a folder is half written, or the process has ended."""
    while not process.wait(0.002):
        if list(checkpoints.glob("*.orbax-checkpoint-tmp*")):
            return
