"""Processes on this machine, which find each other; started again when they fail."""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO

from launch.clouds import remote_jobs
from launch.jobs import restart_policy
from launch.jobs.launch_job import LaunchJob, LaunchPlan

HELP = "processes on this machine"
TOOLS: Mapping[str, str] = {}
POLL = 0.1  # seconds between two looks at the processes
PATIENCE = 60.0  # seconds that the others have to end after one has failed


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--restarts", type=int, default=3, help="after failures; default: 3"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of the first process; default: a free one"
    )


def plan(jobs: Sequence[LaunchJob], options: argparse.Namespace) -> LaunchPlan:
    """Of one job, to run; of several, to show: `launch.sweep` takes them in turn."""
    remote_jobs.check_counts(options, {"processes": 1, "restarts": 0})
    many = options.processes > 1
    commands = [job.command(sys.executable, distributed=many) for job in jobs]
    if not many:
        return LaunchPlan({}, commands, [job.env for job in jobs])
    env = []
    for job in jobs:
        address = f"localhost:{options.port or free_port()}"
        env += [
            {
                **job.env,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(options.processes),
                "JAX_PROCESS_ID": str(index),
            }
            for index in range(options.processes)
        ]
    return LaunchPlan({}, [c for c in commands for _ in range(options.processes)], env)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run(plan: LaunchPlan, options: argparse.Namespace) -> int:
    """Until the run is done or must not be tried again; returns its exit code.

    A signal to the launcher goes to every process, and ends the restarts.
    """
    logging.basicConfig(level=logging.INFO, format="launch: %(message)s")
    with ProcessGroup() as group:
        return group.train(plan, options.restarts)


class ProcessGroup:
    """Processes that train one run, started again when that is worth it.

    Entered, it takes the signals that this process is sent.

    Attributes:
      told: the last of them, if any.
    """

    def __init__(self) -> None:
        self.told: int | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "ProcessGroup":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        # A terminal that is gone asks to stop, as a cluster does: trainers know that.
        self.told = signal.SIGTERM if number == signal.SIGHUP else number
        for process in self._running:
            if process.poll() is None:
                process.send_signal(self.told)

    def train(
        self,
        plan: LaunchPlan,
        restarts: int,
        output: IO[bytes] | None = None,
        watch: Callable[[], None] = lambda: None,
        inherit: Sequence[int] = (),
    ) -> int:
        """Starts every command at once, and again; returns the last exit code.

        Args:
          plan: one command a process.
          restarts: after failures; a preemption costs none.
          output: where they write to; by default where the launcher does.
          watch: called now and then.
          inherit: file descriptors that they have, too.
        """
        while True:
            code = self._run_once(plan, output, watch, inherit)
            if self.told is not None or not restart_policy.again(code, restarts):
                return code
            restarts -= code != restart_policy.PREEMPTED
            logging.info(
                "ended with code %d; once more, %d failures left", code, restarts
            )

    def _run_once(
        self,
        plan: LaunchPlan,
        output: IO[bytes] | None,
        watch: Callable[[], None],
        inherit: Sequence[int],
    ) -> int:
        """Returns the code that says most."""
        env = plan.env or [{}] * len(plan.commands)
        self._running = []
        for command, own in zip(plan.commands, env, strict=True):
            process = subprocess.Popen(
                command,
                env=os.environ | own,
                stdout=output,
                stderr=output,
                pass_fds=inherit,
                # Of its own: the terminal's Ctrl-C comes once, through `_forward`.
                process_group=0,
            )
            self._running.append(process)
            # It came between the last look and this start.
            if self.told is not None:
                process.send_signal(self.told)
        failed_at = None
        while any(process.poll() is None for process in self._running):
            if failed_at is None and any(x.returncode for x in self._running):
                failed_at = time.monotonic()
            # They leave by themselves when another has failed, with their stacks.
            if failed_at and time.monotonic() - failed_at > PATIENCE:
                for process in self._running:
                    process.kill()
            watch()
            time.sleep(POLL)
        return restart_policy.worst([process.returncode for process in self._running])
