"""Two commits in turn: is the working tree slower than another commit?

    make bench-guard FLAGS="--against=main~5 --jobs=lora,decode"

The other commit is checked out into a folder of its own, with the environment of this
one. Each job has a process for each side, with equal settings. The two wait for each
other: one step here, one step there, and in the next round the other side begins, so
whatever else the machine does slows both. Prints a line for each job: the median of the
ratios new / old over the rounds, and its 95 % interval. Exit code 1: a job is slower
than --limit allows, and its whole interval is above 1, also when it is measured again.

Without --against it is HEAD where files have changed since, else where this branch has
left `main`, else the commit before HEAD.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("bench_guard_side.py")
JOBS = ("lora", "pretrain", "decode")
CONFIDENCE = 0.95
# A job that is slower is measured again, in new processes: where the memory of one lies
# can slow all of its steps.
ATTEMPTS = 2
FEWEST_ROUNDS = 6  # With fewer, no interval of the median has this confidence.


def git(*words: str, folder: Path = ROOT) -> str:
    """The output of git.

    Raises:
      SystemExit: git fails; its own words say why.
    """
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
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

    def answer(self) -> float:
        """Waits for one line: a JSON number.

        Raises:
          SystemExit: the process has ended.
        """
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        end = self._errors.read()[-3000:]
        raise SystemExit(f"{self._name} ended with {self._process.returncode}:\n{end}")

    def step(self) -> float:
        """Seconds of one step."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why.
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def ratios(new: Side, old: Side, rounds: int) -> list[float]:
    """Seconds of the new side by those of the old one, of each round."""
    found = []
    for number in range(rounds):
        if number % 2:
            before = old.step()
            after = new.step()
        else:
            after = new.step()
            before = old.step()
        found.append(after / before)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by order statistics.

    The number of values below the true median is binomial, whatever their distribution
    (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    ordered, count = sorted(values), len(values)
    left_out, tail = 0, 0.0
    while True:
        tail += math.comb(count, left_out) / 2**count
        if tail > (1 - CONFIDENCE) / 2:
            break
        left_out += 1
    if not left_out:
        raise ValueError(f"{count} values: at least {FEWEST_ROUNDS} are needed")
    return ordered[left_out - 1], ordered[count - left_out]


def judge(job: str, found: Sequence[float], limit: float) -> tuple[str, bool]:
    """A line about a job, and whether it is slower than `limit` (0.05: 5 %) allows."""
    middle, (low, high) = statistics.median(found), interval(found)
    slower = middle > 1 + limit and low > 1
    verdict = f"SLOWER by more than {limit:.0%}" if slower else "ok"
    return (
        f"{job}: {middle:.3f} of the time ({low:.3f} to {high:.3f}), {verdict}",
        slower,
    )


def compare(new: Path, old: Path, job: str, rounds: int) -> list[float]:
    """The ratios of a job in two folders."""
    with contextlib.ExitStack() as stack:
        sides = []
        for folder in (new, old):
            side = Side(folder, job)
            stack.callback(side.close)
            side.answer()  # One compiles after the other.
            sides.append(side)
        return ratios(*sides, rounds)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--against", default="", help="commit, branch or tag; default: above")
    add("--jobs", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    add("--rounds", type=int, default=20, help="steps of each side that count")
    add("--limit", type=float, default=0.05, help="0.05: 5 %% slower is still allowed")
    options = parser.parse_args(argv)
    options.jobs = options.jobs.split(",")
    if unknown := {*options.jobs} - {*JOBS}:
        parser.error(f"--jobs: no {sorted(unknown)[0]}; there are {', '.join(JOBS)}")
    if options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds={options.rounds}: at least {FEWEST_ROUNDS} are needed")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if any job is slower."""
    options = parse(argv)
    commit = git("rev-parse", "--short", options.against or other_commit())
    print(f"the working tree against {git('log', '-1', '--format=%h %s', commit)}")
    code = 0
    with checked_out(commit) as old:
        for job in options.jobs:
            for _ in range(ATTEMPTS):
                found = compare(ROOT, old, job, options.rounds)
                line, slower = judge(job, found, options.limit)
                print(line, flush=True)
                if not slower:
                    break
            else:
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
