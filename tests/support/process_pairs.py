"""Two processes that train one run, and what makes one of them hang."""

import types

from commands import chain
from kills import WAITS_FOR_REQUESTS, ask
from pretraining_runs import STEP_LINE

MESH = ("--config.mesh.fsdp=2", "--config.mesh.context=2")


PLAIN = ("--config.export=False", "--config.text.cache_dir=tokens-of-two")


# Seconds: a busy machine compiles, without a sign of life, for twenty, and stalls.
LIMIT = 90


PAIR = ("--config=pretrain.py", *MESH, *PLAIN, f"--config.runtime.watchdog_s={LIMIT}")


def start_pair(place, run, *flags, **options):
    where = f"--config.run_dir=runs/{run}"
    return place.start_together(2, *PAIR, where, *flags, **options)


@chain
def two_processes(place, results):
    """Asked to save, to sample and to stop; then the launcher resumes both.

    They are `stopped` with `saved` steps, and `launched`; `answers` are those to the
    requests.
    """
    results("pretrained")
    run = "two-processes"
    waits = WAITS_FOR_REQUESTS.format(run=run)
    running = start_pair(place, run, programs=dict.fromkeys((0, 1), waits))
    running[0].wait_for(STEP_LINE.format(1))
    answers = ask(place, run, "checkpoint", "sample", "stop")
    stopped = [process.finish() for process in running]
    saved = place.saved_steps(run)
    # The decoder has been compiled for two processes once.
    flags = (*PAIR, f"--config.run_dir=runs/{run}", "--config.eval.text_prompts=()")
    launched = place.launch(("local", "--processes=2"), flags, devices=2)
    return types.SimpleNamespace(
        answers=answers, stopped=stopped, saved=saved, launched=launched
    )


_HANG = """
import time
from research.train.programs import device_batches
pull = device_batches.DeviceBatches.__next__
def hang(self):
    if self.number == {batch}:
        {what}
    return pull(self)
device_batches.DeviceBatches.__next__ = hang
"""


def hang(what, batch=2):
    """A program that makes a training do `what` after `batch`, counted from 0."""
    return _HANG.format(what=what, batch=batch)
