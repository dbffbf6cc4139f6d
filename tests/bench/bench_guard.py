"""Two commits in turn: is the working tree slower than another commit?

    make bench-guard FLAGS="--against=main~5 --jobs=lora,decode"

The other commit is checked out into a folder of its own, with the environment of this
one. Each job has a process for each side, with equal settings. The two wait for each
other: one step here, one step there, and in the next round the other side begins, so
whatever else the machine does slows both. Prints a line for each job: the median of the
ratios new / old over the rounds, and its 95 % interval. A job ends when that is within
--limit or slower for certain, after --rounds, or when its share of --minutes is over.
Exit code 1: a job is slower than --limit allows, and its whole interval is above 1,
also when it is measured again. Exit code 2: a flag, git or a side failed. Exit code 3:
there was no time to measure a job. `make` turns each of them into its own 2.

Without --against it is HEAD where files have changed since, else where this branch has
left `main`, else the commit before HEAD.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("bench_guard_side.py")
JOBS = ("lora", "pretrain", "decode")
CONFIDENCE = 0.95
# Rounds after which the figures may decide; then after twice as many, and so on.
FIRST_LOOK = 8
TELL_S = 30.0  # from one line of progress to the next, at most about


class GuardError(Exception):
    """The two sides cannot be compared at all."""


def git(*words: str, folder: Path = ROOT) -> str:
    """The output of git.

    Raises:
      GuardError: git fails; its own words say why.
    """
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True
    )
    if done.returncode:
        raise GuardError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def other_commit(folder: Path = ROOT) -> str:
    """The commit that the working tree is compared with by default."""
    head = git("rev-parse", "HEAD", folder=folder)
    if git("status", "--porcelain", "--untracked-files=no", folder=folder):
        return head
    branches = git("branch", "--list", "main", folder=folder)
    base = git("merge-base", "HEAD", "main", folder=folder) if branches else head
    return base if base != head else git("rev-parse", "HEAD~1", folder=folder)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-guard-") as parent:
        folder = Path(parent) / "other"
        git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


class OutOfTimeError(Exception):
    """A job has had its share of `--minutes`."""


class Side:
    """The process of one job in one folder, which takes a step when it is told to."""

    def __init__(self, folder: Path, job: str):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, see `close`.
        self._name = f"{job} in {folder}"
        self._process = subprocess.Popen(
            [sys.executable, str(SIDE), job],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def answer(self, over: float) -> float:
        """Waits for one line, a JSON number, until the clock shows `over`.

        Raises:
          GuardError: the process has ended.
          OutOfTimeError: there is no line yet.
        """
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(max(0.0, over - time.monotonic())):
                raise OutOfTimeError
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        end = self._errors.read()[-3000:]
        raise GuardError(f"{self._name} ended with {self._process.returncode}:\n{end}")

    def step(self, over: float) -> float:
        """Seconds of one step."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why.
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer(over)

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


def ratios(new: Side, old: Side, over: float) -> Iterator[float]:
    """Seconds of the new side by those of the old one, round by round."""
    for number in itertools.count():
        if number % 2:
            before = old.step(over)
            after = new.step(over)
        else:
            after = new.step(over)
            before = old.step(over)
        yield after / before


def interval(values: Sequence[float], missed: float) -> tuple[float, float]:
    """The interval that misses the median with a chance of `missed`, at most.

    By order statistics: the number of values below the true median is binomial,
    whatever their distribution (Conover, Practical Nonparametric Statistics, section
    3.2). With too few values it has no end.
    """
    ordered, count = sorted(values), len(values)
    left_out, tail = 0, 0.0
    while True:
        tail += math.comb(count, left_out) / 2**count
        if tail > missed / 2:
            break
        left_out += 1
    if not left_out:
        return -math.inf, math.inf
    return ordered[left_out - 1], ordered[count - left_out]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Ratios new / old, and what follows from them.

    Attributes:
      limit: 0.05 allows 5 % more time.
      missed: the chance with which the interval misses the true median.
    """

    found: Sequence[float]
    limit: float
    missed: float

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.found, self.missed)

    @property
    def slower(self) -> bool:
        low, _ = self.interval
        return low > 1 and statistics.median(self.found) > 1 + self.limit

    @property
    def decided(self) -> bool:
        """Further rounds would hardly change the verdict."""
        return self.slower or self.interval[1] <= 1 + self.limit

    @property
    def measured(self) -> bool:
        return math.isfinite(self.interval[0])

    def __str__(self) -> str:
        if not self.measured:
            return f"NOT MEASURED: {len(self.found)} rounds are too few"
        words = "ok" if self.decided else "ok, but not for certain"
        words = f"SLOWER by more than {self.limit:.0%}" if self.slower else words
        low, high = self.interval
        middle = statistics.median(self.found)
        return (
            f"{middle:.3f} of the time ({low:.3f} to {high:.3f}, "
            f"{len(self.found)} rounds), {words}"
        )


def compare(
    new: Path, old: Path, job: str, options: argparse.Namespace, over: float
) -> Verdict:
    """Measures a job in two folders until it is decided, or out of rounds or time.

    Looking at the figures several times finds a difference by chance more often than
    looking once, so each look has its share of what the last interval may miss
    (Bonferroni).
    """
    doubled = math.ceil(math.log2(options.rounds / FIRST_LOOK))
    looks = {*(FIRST_LOOK * 2**n for n in range(doubled)), options.rounds}
    missed = (1 - CONFIDENCE) / len(looks)
    verdict, begun = Verdict((), options.limit, missed), time.monotonic()
    with contextlib.ExitStack() as stack, contextlib.suppress(OutOfTimeError):
        sides = []
        for folder in (new, old):
            sides.append(Side(folder, job))
            stack.callback(sides[-1].close)
        for side in sides:
            side.answer(over)  # Both are warm.
        said = warm = time.monotonic()
        tell(f"{job}: both sides are warm after {warm - begun:.0f} s")
        found: list[float] = []
        for ratio in itertools.islice(ratios(*sides, over), options.rounds):
            found.append(ratio)
            verdict = dataclasses.replace(verdict, found=tuple(found))
            now = time.monotonic()
            if len(found) not in looks and now < said + TELL_S:
                continue
            a_round, said = (now - warm) / len(found), now
            left = min((options.rounds - len(found)) * a_round, over - now)
            tell(f"{job}: {verdict}; at most {max(left, 0.0):.0f} s more")
            if verdict.decided and len(found) in looks:
                break
    return verdict


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def judge(
    new: Path, old: Path, job: str, options: argparse.Namespace, over: float
) -> Verdict:
    """The verdict about a job; one that is slower is measured again, in new processes.

    Where the memory of a process lies can slow all of its steps, so one measurement
    never says that a job is slower: without time for the second, nothing is measured.
    Each of the two has half of the time.
    """
    now = time.monotonic()
    first = compare(new, old, job, options, now + (over - now) / 2)
    if not first.slower:
        return first
    tell(f"{job}: {first}; it is measured again")
    return compare(new, old, job, options, over)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--against", default="", help="commit, branch or tag; default: above")
    add("--jobs", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    add("--rounds", type=int, default=64, help="most steps of each side that count")
    add("--minutes", type=float, default=15.0, help="of the whole, shared by the jobs")
    add("--limit", type=float, default=0.05, help="0.05: 5 %% slower is still allowed")
    options = parser.parse_args(argv)
    options.jobs = options.jobs.split(",")
    if unknown := {*options.jobs} - {*JOBS}:
        parser.error(f"--jobs: no {sorted(unknown)[0]}; there are {', '.join(JOBS)}")
    if options.rounds < FIRST_LOOK:
        parser.error(f"--rounds={options.rounds}: at least {FIRST_LOOK} are needed")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if any job is slower, else 3 if one was not measured."""
    options = parse(argv)
    over = time.monotonic() + 60 * options.minutes
    commit = git("rev-parse", "--short", options.against or other_commit())
    print(f"the working tree against {git('log', '-1', '--format=%h %s', commit)}")
    verdicts = []
    with checked_out(commit) as old:
        for number, job in enumerate(options.jobs):
            now = time.monotonic()
            share = (over - now) / (len(options.jobs) - number)
            verdicts.append(judge(ROOT, old, job, options, now + share))
            print(f"{job}: {verdicts[-1]}", flush=True)
    if any(verdict.slower for verdict in verdicts):
        return 1
    return 0 if all(verdict.measured for verdict in verdicts) else 3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuardError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
