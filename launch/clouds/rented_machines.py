"""Rented machines of a launch: made, used, made again when lost, and deleted."""

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

SETTLE = 30.0  # seconds between two looks at a machine, and before a cloud knows
READY = ("READY", "ACTIVE")
COMING = (
    *("CREATING", "STARTING", "REPAIRING", "RESTARTING"),
    *("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
)
# Empty: it is not there any more.
LOST = ("", "PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDING", "SUSPENDED", "DELETING")
INTERRUPTED = 130
NO_CONNECTION = 255  # of ssh itself, whatever becomes of the trainer
LONGEST = 20  # times SETTLE, between two tries to make a machine again
SILENT = 120  # lost connections one after another, about an hour, to give up after


@dataclasses.dataclass(frozen=True)
class RentedMachine:
    """One machine, or several that are rented together.

    Attributes:
      name: as the cloud knows it.
      steps: the commands of each of `create`, `state`, `push`, `install`, `train`,
        `tail`, `stop` and `delete` that are to be done, in their order. `state` prints
        one of the cloud's words, `tail` ends with the trainer's exit code.
      log: what the commands say goes there; None for the terminal.
    """

    name: str
    steps: Mapping[str, Sequence[Sequence[str]]]
    log: Path | None = None


@dataclasses.dataclass(frozen=True)
class MachinesPlan(LaunchPlan):
    """A plan whose commands are those of `before` and of the machines' steps."""

    before: Sequence[Sequence[str]] = ()
    machines: Sequence[RentedMachine] = ()


def run(plan: MachinesPlan, restarts: int, *, whole: bool) -> int:
    """Does the steps, all machines at once; returns the exit code that says most.

    Args:
      restarts: of a trainer that failed; what was lost is made again without limit,
        and a lost connection looked through again.
      whole: from the making to the deleting, with what goes wrong between them.
    """
    calls = CommandRunner()
    # The last is that of a terminal that is gone.
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
    if calls.told.is_set():
        logging.info("let go of; nothing was deleted: see --do=tail|stop|delete")
        return INTERRUPTED
    return restart_policy.worst(codes)


class CommandRunner:
    """Commands that run for machines.

    Attributes:
      told: set once a signal has come to this launcher.
    """

    def __init__(self) -> None:
        self.told = threading.Event()
        self._running: set[subprocess.Popen[str]] = set()

    def forward(self, number: int, frame: FrameType | None) -> None:
        self.told.set()
        for process in list(self._running):
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def do(self, commands: Sequence[Sequence[str]], log: Path | None) -> int:
        """In order, up to the first that fails; returns its exit code."""
        for command in commands:
            if self.told.is_set():
                return INTERRUPTED
            if log is None:
                code = self._wait(command, None)
            else:
                with log.open("a", encoding="utf-8") as out:
                    code = self._wait(command, out)
            if code:
                return code
        return 0

    def _wait(self, command: Sequence[str], out: IO[str] | None) -> int:
        # A group of its own: the terminal's Ctrl-C comes once, through `forward`. It
        # may not read the terminal then.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            text=True,
            process_group=0,
        )
        self._running.add(process)
        code = process.wait()
        self._running.discard(process)
        return code


class MachineLifecycle:
    """Of one machine, from its making to its end."""

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
            return code  # It may be another's of that name: it is not ours to delete.
        while True:
            code = self._prepare() or self._do("train") or self._do("tail")
            if code in restart_policy.FINAL or self._calls.told.wait(SETTLE):
                break
            state = self._state()
            if state is None:
                self._say("gcloud does not say what became of it: it was left alone")
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
        if not self._calls.told.is_set():
            self._do("delete")
        return code

    def _is_cut_off(self, code: int) -> bool:
        """Whether only the connection was lost, to a machine that once answered.

        One that never did may never: a closed port, or a key that is missing.
        """
        self._silent = self._silent + 1 if code == NO_CONNECTION else 0
        return self._prepared and 0 < self._silent <= SILENT

    def _do(self, step: str) -> int:
        """A step that is not among the machine's is done."""
        return self._calls.do(self._machine.steps.get(step, ()), self._machine.log)

    def _prepare(self) -> int:
        """Once it is ready, all that is needed on it, unless that was done before."""
        if self._prepared:
            return 0
        while (state := self._state()) in COMING:
            if self._calls.told.wait(SETTLE):
                return INTERRUPTED
        if state not in READY:
            self._say(f"{state or 'gone'}: it does not become ready")
            return 1
        code = self._do("push") or self._do("install")
        self._prepared = code == 0
        return code

    def _remake(self, state: str) -> int:
        self._prepared = False
        if "delete" not in self._machine.steps:
            self._say("it is kept as it is")
            return 1
        if deleted := self._do("delete") if state else 0:
            return deleted
        # There is seldom room at once where something has just been taken away.
        pauses = 1
        while code := self._do("create"):
            self._say(f"not made again yet, code {code}: tried until it is")
            if self._calls.told.wait(min(pauses, LONGEST) * SETTLE):
                return code
            pauses *= 2
        return 0

    def _state(self) -> str | None:
        """A word of the cloud's, empty where the machine is gone; None if unknown."""
        (command,) = self._machine.steps["state"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        sys.stderr.write(done.stderr)
        return "" if "NOT_FOUND" in done.stderr else None

    def _say(self, text: str) -> None:
        logging.info("%s: %s", self._machine.name, text)
