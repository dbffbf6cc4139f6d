"""Creates the machines of a launch, replaces those that are lost, and deletes them."""

import contextlib
import dataclasses
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import IO

from launch.jobs import restart_policy
from launch.jobs.launch_job import LaunchPlan

SETTLE = 30.0  # seconds between two queries, and until a cloud knows a new state
READY = ("READY", "ACTIVE")
COMING = (
    "CREATING", "STARTING", "REPAIRING", "RESTARTING", "ACCEPTED",
    "WAITING_FOR_RESOURCES", "PROVISIONING",
)  # fmt: skip
# An empty state: the machine does not exist.
LOST = ("", "PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDING", "SUSPENDED", "DELETING")
INTERRUPTED = 130
NO_CONNECTION = 255  # exit code of ssh itself; it says nothing about the trainer
LONGEST = 20  # times SETTLE: the longest pause between tries to create a machine
SILENT = 120  # lost connections in a row, about an hour, before giving up


@dataclasses.dataclass(frozen=True)
class RentedMachine:
    """One machine, or several that are rented together.

    Attributes:
      steps: the commands of each step to take, in order, out of `create`, `state`,
        `push`, `install`, `train`, `tail`, `stop` and `delete`. `state` prints one of
        the cloud's words; `tail` exits with the trainer's exit code.
      log: file for the output of the commands; None for the terminal.
    """

    name: str
    steps: Mapping[str, Sequence[Sequence[str]]]
    log: Path | None = None


@dataclasses.dataclass(frozen=True)
class MachinesPlan(LaunchPlan):
    """A plan made of the commands `before` and the steps of each machine."""

    before: Sequence[Sequence[str]] = ()
    machines: Sequence[RentedMachine] = ()


def run(plan: MachinesPlan, restarts: int, *, whole: bool) -> int:
    """Takes the steps of all machines at once; returns the most telling exit code.

    A trainer that failed is restarted so many times. A lost machine is created again,
    and a lost connection is opened again, without counting as a failure. With `whole`,
    each machine is managed from its creation to its deletion.
    """
    calls = CommandRunner()
    # SIGHUP comes from a closed terminal.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, calls.forward)
    code = calls.do(plan.before, None)
    if code:
        return code

    def one(machine: RentedMachine) -> int:
        if whole:
            return MachineLifecycle(machine, calls, restarts).live()
        steps = [command for step in machine.steps.values() for command in step]
        return calls.do(steps, machine.log)

    with ThreadPoolExecutor(len(plan.machines)) as pool:
        codes = list(pool.map(one, plan.machines))
    if calls.interrupted.is_set():
        logging.info("interrupted; nothing was deleted: see --do=tail|stop|delete")
        return INTERRUPTED
    return restart_policy.worst(codes)


class CommandRunner:
    """Commands that run for machines.

    Attributes:
      interrupted: set once this launcher has received a signal.
    """

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()

    def forward(self, number: int, frame: FrameType | None) -> None:
        self.interrupted.set()
        for process in list(self._running):
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def do(self, commands: Sequence[Sequence[str]], log: Path | None) -> int:
        """Runs commands up to the first that fails; returns its exit code, or 0."""
        with log.open("a") if log else contextlib.nullcontext() as out:
            for command in commands:
                if self.interrupted.is_set():
                    return INTERRUPTED
                if code := self._run(command, out):
                    return code
        return 0

    def _run(self, command: Sequence[str], out: IO[str] | None) -> int:
        # A group of its own: Ctrl-C reaches it once, through `forward`. A process of a
        # background group cannot read the terminal.
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
        ) as process:
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        return code


class MachineLifecycle:
    """Manages one machine from its creation to its deletion."""

    def __init__(
        self, machine: RentedMachine, calls: CommandRunner, restarts: int
    ) -> None:
        self._machine, self._calls, self._left = machine, calls, restarts
        self._prepared = False
        self._silent = 0

    def live(self) -> int:
        """Returns the trainer's exit code, or that of the command that failed."""
        code = self._do("create")
        if code:
            # A machine of that name may belong to somebody else, so do not delete it.
            return code
        while True:
            code = self._prepare() or self._do("train") or self._do("tail")
            if code in restart_policy.FINAL or self._calls.interrupted.wait(SETTLE):
                break
            state = self._state()
            if state is None:
                self._say("gcloud does not tell its state; it was not deleted")
                return code
            gone = state in LOST or (state in READY and self._is_cut_off(code))
            ended = restart_policy.PREEMPTED if gone else code
            if not restart_policy.again(ended, self._left):
                break
            self._left -= ended != restart_policy.PREEMPTED
            self._say(f"{state or 'gone'}, code {code}; {self._left} failures left")
            if state not in READY and (failed := self._remake(state)):
                self._say("it could not be made again")
                return failed
        if not self._calls.interrupted.is_set():
            self._do("delete")
        return code

    def _is_cut_off(self, code: int) -> bool:
        """Whether only the connection was lost, to a machine that once answered.

        A machine that never answered may never do so: a closed port, a missing key.
        """
        self._silent = self._silent + 1 if code == NO_CONNECTION else 0
        return self._prepared and 0 < self._silent <= SILENT

    def _do(self, step: str) -> int:
        """Takes a step; one that the machine does not have succeeds."""
        return self._calls.do(self._machine.steps.get(step, ()), self._machine.log)

    def _prepare(self) -> int:
        """Waits until it is ready and sets it up, unless that is done; an exit code."""
        if self._prepared:
            return 0
        while (state := self._state()) in COMING:
            if self._calls.interrupted.wait(SETTLE):
                return INTERRUPTED
        if state not in READY:
            self._say(f"{state or 'gone'}: it will not become ready")
            return 1
        code = self._do("push") or self._do("install")
        self._prepared = code == 0
        return code

    def _remake(self, state: str) -> int:
        self._prepared = False
        if "delete" not in self._machine.steps:
            self._say("it is kept because of --keep")
            return 1
        if deleted := self._do("delete") if state else 0:
            return deleted
        # A cloud seldom has room at once where it has just preempted a machine.
        pauses = 1
        while code := self._do("create"):
            self._say(f"could not be created again, code {code}; trying again")
            if self._calls.interrupted.wait(min(pauses, LONGEST) * SETTLE):
                return code
            pauses *= 2
        return 0

    def _state(self) -> str | None:
        """The cloud's word for its state; empty if it is gone, None if unknown."""
        (command,) = self._machine.steps["state"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        sys.stderr.write(done.stderr)
        return "" if "NOT_FOUND" in done.stderr else None

    def _say(self, text: str) -> None:
        logging.info("%s: %s", self._machine.name, text)
