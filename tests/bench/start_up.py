"""Start-up, grace and restart: seconds to the first step, and from SIGTERM to the end.

    python tests/bench/start_up.py [--config=configs/finetune_dolly.py] [--warm=2]

Each start is the real command in an empty run directory. The first finds no compiled
programs, the others those that it has left; each ends once the log says that the
first step has begun. Memory is the peak of the process until then. Then one run gets
SIGTERM after its second step, and is started again from what it has saved.
"""

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PREEMPTED = 75  # research/errors.py
BEGUN = re.compile(r"first step begun ([\d.]+) s after")


@contextlib.contextmanager
def running(config: str, cache: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, whose lines are read from its `stdout`; it is killed afterwards."""
    command = [
        sys.executable, "-m", "research.train", f"--config={config}",
        f"--config.run_dir={folder}/run",
        f"--config.runtime.compilation_cache={cache}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def read_until(process: subprocess.Popen[str], said: re.Pattern[str]) -> re.Match[str]:
    """The first line that has it.

    Raises:
      SystemExit: it ended before.
    """
    output = []
    for line in process.stdout or ():
        output.append(line)
        if found := said.search(line):
            return found
    raise SystemExit(f"ended without {said.pattern!r}:\n" + "".join(output[-20:]))


def start(config: str, cache: Path, folder: Path) -> tuple[float, float]:
    """Seconds to the first step, and the process's peak memory in GB."""
    with running(config, cache, folder) as process:
        seconds = float(read_until(process, BEGUN)[1])
        return seconds, peak_gb(process.pid, Path(f"/proc/{process.pid}/status"))


def stop(config: str, cache: Path, folder: Path) -> float:
    """Seconds from SIGTERM, sent while the step after step 2 runs, to the exit.

    Raises:
      SystemExit: it did not save and ask to be started again.
    """
    with running(config, cache, folder) as process:
        read_until(process, re.compile(r"step +2/"))
        sent = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        read_until(process, re.compile("which is saved"))
        if process.wait() != PREEMPTED:
            raise SystemExit(f"ended with {process.returncode}, not {PREEMPTED}")
        return time.perf_counter() - sent


def peak_gb(pid: int, status: Path) -> float:
    """The peak where the system keeps it (Linux), else what is resident now."""
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / 1e9
    return psutil.Process(pid).memory_info().rss / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/finetune_dolly.py")
    parser.add_argument("--warm", type=int, default=2, help="starts after the first")
    arguments = parser.parse_args()
    count = 1 + arguments.warm
    with contextlib.ExitStack() as stack:
        new = tempfile.TemporaryDirectory
        cache, *folders = [
            Path(stack.enter_context(new())) for _ in range(1 + count + 1)
        ]
        starts = [start(arguments.config, cache, folders[i]) for i in range(count)]
        grace = stop(arguments.config, cache, folders[count])
        resumed, _ = start(arguments.config, cache, folders[count])
    names = ["cold", *["warm"] * arguments.warm]
    for name, (seconds, memory) in zip(names, starts, strict=True):
        print(f"{name}: first step after {seconds:.1f} s, {memory:.2f} GB")
    if arguments.warm:
        warm = statistics.median(seconds for seconds, _ in starts[1:])
        print(f"warm / cold: {warm / starts[0][0]:.2f}")
    print(f"SIGTERM in a step: saved and ended after {grace:.1f} s")
    print(f"restored: first step after {resumed:.1f} s")


if __name__ == "__main__":
    main()
