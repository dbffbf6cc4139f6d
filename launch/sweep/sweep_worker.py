"""Trains the runs of a sweep that are not done; any number of workers may share them.

Each run has a lock file. The worker and the trainer it starts both hold the lock, and
the system releases it when both have ended, however they end. `filelock` is not used
here because a trainer cannot inherit its lock.
"""

import contextlib
import fcntl
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launch.jobs import restart_policy
from launch.jobs.launch_job import LaunchPlan
from launch.sweep.run_packs import RunPack
from launch.sweep.sweep_runs import SweepRun, failure_of
from launch.targets.local import ProcessGroup
from research.core.errors import PREEMPTED, UserError
from research.core.json_files import read_json
from research.report.progress_view import duration
from research.runs.control.job_logs import last_error, tail
from research.runs.metrics_file import read_metrics

POLL = 2.0  # seconds between two checks of what other workers have finished
LOG_EVERY = 30.0  # seconds between two lines of progress
REPORT_REST = 20  # A report rests this many times as long as it took.
LOG_BYTES = 2**16  # of the end of a log, where its last message is


def _time_of_files(folder: Path) -> float:
    """When a file that is made now was made, by the clock that marks of failures have.

    That clock lags behind `time.time` by up to 10 ms, and may be of another machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


class SweepWorker:
    """Trains one pack after the other until none is left.

    Attributes:
      failures: exit codes by run, of this worker and, since it began, of others.
    """

    def __init__(
        self,
        packs: Sequence[RunPack],
        runs: Sequence[SweepRun],
        folder: Path,
        group: ProcessGroup,
        check: Callable[[], object] = lambda: None,
    ):
        """`packs` remain to be trained; `runs` are all runs of the sweep.

        `check` is called after each pack that has ended, and meanwhile.
        """
        self._check = check
        self._packs, self._runs = packs, runs
        self._folder, self._group = folder, group
        self._begun = _time_of_files(folder)
        self._trained = 0.0  # Steps that this worker has trained.
        self._spent = 0.0  # Seconds that it took, start-up included.
        self.failures: dict[str, int] = {}

    def work(self, plans: Sequence[LaunchPlan], restarts: int) -> int:
        """Trains all packs that no other worker trains; returns the exit code.

        `plans` has the commands of each pack. No other pack is started after an error
        of the user's before any run of the sweep has made a step.

        Raises:
          UserError: what `check` raises.
        """
        logging.info("%s", self._standing())
        waiting = list(zip(self._packs, plans, strict=True))
        while waiting and self._group.last_signal is None:
            left = []
            for pack, plan in waiting:
                if (
                    self._group.last_signal is not None
                    or pack.is_done
                    or self._failed(pack)
                ):
                    continue
                with self._claim(pack) as locks:
                    if not locks:
                        left.append((pack, plan))
                    elif not pack.is_done:
                        self._train(pack, plan, restarts, locks)
                        if self._is_refused(pack):
                            return UserError.exit_code
                        self._check()
            if len(left) == len(waiting):
                time.sleep(POLL)  # Other workers train all that is left.
            waiting = left
        if self._group.last_signal is not None:
            return PREEMPTED
        return restart_policy.worst(list(self.failures.values()))

    @contextlib.contextmanager
    def _claim(self, pack: RunPack) -> Iterator[list[int]]:
        """Locks all runs of a pack; yields file descriptors, none if one is taken."""
        claims = self._folder / "claims"
        claims.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            locks = []
            # Sorted: of two workers that want the same runs, one gets all of them.
            for name in sorted(run.name for run in pack.runs):
                lock = os.open(claims / name, os.O_RDWR | os.O_CREAT, 0o644)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    locks = []
                    break
                locks.append(lock)
            yield locks

    def _train(
        self, pack: RunPack, plan: LaunchPlan, restarts: int, locks: Sequence[int]
    ) -> None:
        log = pack.job.file(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        logging.info("training %s; its output is in %s", pack.job.name, log)
        begun, before = time.monotonic(), self._steps(pack)
        for run in pack.runs:
            self._mark(run).unlink(missing_ok=True)
        said = reported = begun

        def watch() -> None:
            nonlocal said, reported
            now = time.monotonic()
            if now - reported >= LOG_EVERY:
                # A run without the metric is an error only when all have ended.
                with contextlib.suppress(UserError):
                    self._check()
                # A report of many long runs takes a small share of the time.
                after = time.monotonic()
                reported = after + REPORT_REST * (after - now)
            if now - said >= LOG_EVERY:
                said = now
                first = pack.runs[0]
                done = f"step {last_step(first)}/{total_steps(first) or '?'}"
                to_go = self._to_go(self._steps(pack) - before, now - begun)
                logging.info("%s: %s%s", pack.job.name, done, to_go)

        with log.open("ab") as output:
            old = output.tell()
            code = self._group.train(plan, restarts, output, watch, locks)
        self._trained += self._steps(pack) - before
        self._spent += time.monotonic() - begun
        if self._group.last_signal is None:
            self._judge(pack, code, log, log.stat().st_size - old)
        logging.info("%s%s", self._standing(), self._to_go())

    def _judge(self, pack: RunPack, code: int, log: Path, written: int) -> None:
        said = last_error(tail(log, min(written, LOG_BYTES)))
        for run in pack.runs:
            mark = self._mark(run)
            if run.is_done:
                mark.unlink(missing_ok=True)
                continue
            # A pack exits with the code of its worst run.
            self.failures[run.name] = code or 1
            mark.write_text(f"{code or 1}\n{said}", encoding="utf-8")
            what = restart_policy.describe(code or 1)
            why = said and f"\n{said}"
            logging.error("%s failed with %s; see %s%s", run.name, what, log, why)
        if len(pack.runs) > 1 and not any(run.is_done for run in pack.runs):
            half = math.ceil(len(pack.runs) / 2)
            logging.error("none of them is done: --together=%d needs less memory", half)

    def _is_refused(self, pack: RunPack) -> bool:
        """Whether an error of the user's has ended it before any run made a step."""
        codes = {self.failures.get(run.name) for run in pack.runs}
        if codes != {UserError.exit_code} or any(
            run.is_done or last_step(run) for run in self._runs
        ):
            return False
        if len(self._packs) > 1:
            logging.error("no other run is started: correct this first")
        return True

    def _failed(self, pack: RunPack) -> bool:
        """Whether each run of it is done or has failed since this worker began."""
        for run in pack.runs:
            mark = self._mark(run)
            with contextlib.suppress(OSError, ValueError):
                if not run.is_done and mark.stat().st_mtime >= self._begun:
                    code = mark.read_text(encoding="utf-8").partition("\n")[0]
                    self.failures[run.name] = int(code)
        return all(run.is_done or run.name in self.failures for run in pack.runs)

    def _mark(self, run: SweepRun) -> Path:
        return failure_of(self._folder, run.name)

    def _standing(self) -> str:
        done = sum(run.is_done for run in self._runs)
        failed = len(self.failures)
        return f"{done} of {len(self._runs)} runs are done" + (
            f", {failed} failed" if failed else ""
        )

    def _steps(self, pack: RunPack) -> float:
        """Steps trained so far, summed over the runs of a pack."""
        return sum(last_step(run) for run in pack.runs)

    def _to_go(self, more: float = 0.0, seconds: float = 0.0) -> str:
        """The time that the rest takes at the pace so far, as text."""
        trained, spent = self._trained + more, self._spent + seconds
        open_runs = [run for run in self._runs if not run.is_done]
        totals = [total_steps(run) for run in open_runs]
        left = sum(totals) - sum(map(last_step, open_runs)) if all(totals) else 0
        return time_to_go(left, trained, spent)


def time_to_go(left: float, trained: float, spent: float) -> str:
    """The time that `left` steps take if `trained` ones took `spent` seconds, as text.

    Empty where the pace is not known: a run that resumes from a checkpoint has fewer
    steps than it had logged, until it has passed them.
    """
    if trained <= 0 or left <= 0:
        return ""
    return f"; about {duration(left * spent / trained)} to go for one worker"


def total_steps(run: SweepRun) -> int:
    """The steps of the whole run; 0 before its data says how many its epochs are."""
    if not run.config.epochs:
        return run.config.steps
    nothing: dict[str, list[dict[str, int]]] = {"starts": []}
    try:
        path = run.folder / "run.json"
        found = read_json(path, {"starts": [dict]}, "", absent=nothing)
    except UserError:
        return 0
    planned = [start["steps"] for start in found["starts"] if "steps" in start]
    return planned[-1] if planned else 0


def last_step(run: SweepRun) -> int:
    """The last step in the run's metrics; 0 before the first, or if none can be read.

    It is only shown: the trainer itself reports files that are broken.
    """
    try:
        lines = read_metrics(run.folder)
    except (OSError, UserError):
        return 0
    return max((x["step"] for x in lines if x["kind"] == "train"), default=0)
