"""Works off the studio's queue: `python -m research.studio.jobs --queue=FOLDER`."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError
from research.studio.jobs.job_queue import FILE, JobQueue
from research.studio.jobs.queue_worker import run_detached, work_off

USAGE = """
python -m research.studio.jobs --queue=runs/.studio/queue-HOST

Runs the jobs that wait there, one at a time, and ends when none waits. The studio
starts it; call it by hand after a reboot, to continue without the studio.
"""


@dataclasses.dataclass(frozen=True)
class QueueFlags:
    """The flags of `python -m research.studio.jobs`."""

    queue: str = knob("", "folder of the queue", is_path=True)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, QueueFlags)
    folder = Path(f.queue)
    if not f.queue or not (folder / FILE).is_file():
        raise UserError(f"--queue={f.queue} holds no {FILE}; the studio makes one")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr
    )
    queue = JobQueue(folder)
    count = work_off(queue, lambda job, lock: run_detached(queue, job, lock))
    logging.info("%d jobs have ended, none waits", count)
    return 0


if __name__ == "__main__":
    command_line.run(main)
