"""Processes on this machine, which find each other and restart after a failure."""

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
from typing import IO, Any

from launch.jobs import restart_policy
from launch.jobs.launch_flags import add_restarts, at_least
from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config
from research.core.stop_signals import stop_signals

HELP = "processes on this machine"
TOOLS: Mapping[str, str] = {}
POLL = 0.1  # seconds between two checks of the processes
PATIENCE = 60.0  # seconds that the other processes have to end after one has failed


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=at_least(1), default=1, help="of each run; default: 1"
    )
    add_restarts(parser)
    parser.add_argument(
        "--port", type=int, default=0, help="of the first process; default: a free one"
    )


def rents(options: argparse.Namespace) -> bool:
    """This machine is there already."""
    return False


def chips(options: argparse.Namespace, config: Config) -> None:
    """The chips of this machine are not known before JAX starts."""


def plan(jobs: Sequence[LaunchJob], options: argparse.Namespace) -> LaunchPlan:
    """Plans one job to run it, or several to show them; a sweep plans one at a time."""
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
    """Trains until the run is done or must not be restarted; returns its exit code.

    A signal to the launcher is sent to every process and ends the restarts.
    """
    logging.basicConfig(level=logging.INFO, format="launch: %(message)s")
    with ProcessGroup() as group:
        return group.train(plan, options.restarts)


class ProcessGroup:
    """Processes that train one run and are restarted as `restart_policy` says.

    Inside a `with` block it receives the signals that are sent to this process.

    Attributes:
      last_signal: the last signal, or None.
    """

    def __init__(self) -> None:
        self.last_signal: int | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "ProcessGroup":
        self._before = {
            number: signal.signal(number, self._forward)
            for number in (signal.SIGINT, *stop_signals())
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        # A closed terminal means stop, also to a process that still starts up.
        self.last_signal = signal.SIGTERM if number == signal.SIGHUP else number
        for process in self._running:
            if process.poll() is None:
                process.send_signal(self.last_signal)

    def train(
        self,
        plan: LaunchPlan,
        restarts: int,
        output: IO[bytes] | None = None,
        watch: Callable[[], None] = lambda: None,
        inherit: Sequence[int] = (),
    ) -> int:
        """Runs all commands at once, with restarts; returns the last exit code.

        Args:
          plan: its commands are one per process.
          restarts: number of failures after which to stop; a preemption is none.
          output: file for stdout and stderr; by default those of the launcher.
          watch: called every `POLL` seconds.
          inherit: file descriptors that the processes inherit.
        """
        while True:
            code = self._run_once(plan, output, watch, inherit)
            if self.last_signal is not None or not restart_policy.again(code, restarts):
                return code
            restarts -= code != restart_policy.PREEMPTED
            logging.info(
                "ended with %s; restarting, %d failures left",
                restart_policy.describe(code),
                restarts,
            )

    def _run_once(
        self,
        plan: LaunchPlan,
        output: IO[bytes] | None,
        watch: Callable[[], None],
        inherit: Sequence[int],
    ) -> int:
        """Returns the most telling exit code."""
        env = plan.env or [{}] * len(plan.commands)
        self._running = []
        try:
            for command, own in zip(plan.commands, env, strict=True):
                process = subprocess.Popen(
                    command,
                    env=os.environ | own,
                    stdout=output,
                    stderr=output,
                    pass_fds=inherit,
                    # A group of its own: Ctrl-C reaches it once, through `_forward`.
                    process_group=0,
                )
                self._running.append(process)
                # The signal came before this process was in the list.
                if self.last_signal is not None:
                    process.send_signal(self.last_signal)
            return restart_policy.worst(self._wait(watch))
        except BaseException:  # Nobody would wait for these processes.
            for process in self._running:
                process.terminate()
            raise

    def _wait(self, watch: Callable[[], None]) -> list[int]:
        """Waits until all have ended; returns the exit codes of those that did alone.

        After a failure the others end by themselves and print their stacks. Those that
        do not end within `PATIENCE` are killed.
        """
        ended: dict[int, int] = {}
        failed_at = None
        while len(ended) < len(self._running):
            for number, process in enumerate(self._running):
                code = process.poll()
                if code is None or number in ended:
                    continue
                ended[number] = code
                if code and len(self._running) > 1:
                    what = restart_policy.describe(code)
                    logging.info("process %d has ended with %s", number, what)
                if code and failed_at is None:
                    failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                break
            watch()
            time.sleep(POLL)
        for number in set(range(len(self._running))) - ended.keys():
            logging.error("process %d is killed: it waits for the others", number)
            # With its children, such as those that read data: it leads their group.
            os.killpg(self._running[number].pid, signal.SIGKILL)
            self._running[number].wait()
        return list(ended.values())
