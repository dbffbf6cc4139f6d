"""Works a queue off: one job after the other, until none waits."""

import dataclasses
import fcntl
import logging
import os
import subprocess
from collections.abc import Callable

import psutil

from research.core.errors import PREEMPTED, STOPPED
from research.runs.control.job_logs import tail
from research.runs.utc_clock import utc_now
from research.studio.jobs.job_queue import MACHINE, JobQueue, QueuedJob

ENDS_WELL = (0, STOPPED, PREEMPTED)
SAID = 2000  # bytes of the output of a job that has failed


def work_off(queue: JobQueue, run_job: Callable[[QueuedJob, int], int]) -> int:
    """Runs the jobs of a queue in their order; returns how many.

    Waits first until no other worker, and no job of one that was killed, runs.

    Args:
      queue: its folder exists.
      run_job: runs one job to its end, given a file descriptor that its process must
        inherit; returns the exit code.
    """
    count = 0
    with open(queue.folder / MACHINE, "ab") as machine:
        fcntl.flock(machine, fcntl.LOCK_EX)
        while True:
            with queue.changing() as jobs:
                # Under the lock of the file: who adds a job now finds no worker, or one
                # that will see the job.
                if not jobs.waiting:
                    fcntl.flock(machine, fcntl.LOCK_UN)
                    return count
                job = jobs.waiting.pop(0)
                # Nobody runs now: a worker that was killed has left these.
                jobs.ended = [*jobs.running, *jobs.ended]
                jobs.running = [job]
            code = run_job(job, machine.fileno())
            count += 1
            with queue.changing() as jobs:
                mine = [x for x in jobs.running if x.id == job.id] or [job]
                said = "" if code in ENDS_WELL else tail(job.log, SAID)
                ended = dataclasses.replace(
                    mine[0], ended=utc_now(), exit_code=code, said=said
                )
                jobs.ended = [ended, *(x for x in jobs.ended if x.id != job.id)]
                jobs.running = [x for x in jobs.running if x.id != job.id]


def run_detached(queue: JobQueue, job: QueuedJob, inherit: int) -> int:
    """Runs a job in a session of its own, its output in its log.

    Returns:
      Its exit code; 127 if it cannot be started.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        before = os.fstat(log.fileno()).st_size
        try:
            process = subprocess.Popen(
                job.command,
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[inherit],
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{job.command[0]} cannot be started: {error}\n".encode())
            return 127
    born = psutil.Process(process.pid).create_time()
    begun = dataclasses.replace(
        job, pid=process.pid, born=born, began=utc_now(), log_begin=before
    )
    with queue.changing() as jobs:
        jobs.running = [begun if x.id == job.id else x for x in jobs.running]
    logging.info("%s: process %d of %d", job.name, process.pid, os.getpid())
    return process.wait()
