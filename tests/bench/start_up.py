"""Start-up: seconds from the command to its first step, cold and warm.

    python tests/bench/start_up.py [--config=configs/finetune_dolly.py] [--warm=2]

Each start is the real command in an empty run directory. The first finds no compiled
programs, the others those that it has left; each ends once the log says that the
first step has begun. Memory is the peak of the process until then.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BEGUN = re.compile(r"first step begun ([\d.]+) s after")


def start(config: str, cache: Path) -> tuple[float, float]:
    """Seconds to the first step, and the process's peak memory in GB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "research.train", f"--config={config}",
            f"--config.run_dir={folder}/run",
            f"--config.runtime.compilation_cache={cache}",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        output = []
        try:
            for line in process.stdout or ():
                output.append(line)
                if found := BEGUN.search(line):
                    status = Path(f"/proc/{process.pid}/status")
                    return float(found[1]), peak_gb(process.pid, status)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    raise SystemExit("the run ended before its first step:\n" + "".join(output[-20:]))


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
    with tempfile.TemporaryDirectory() as cache:
        starts = [
            start(arguments.config, Path(cache)) for _ in range(1 + arguments.warm)
        ]
    for name, (seconds, memory) in zip(
        ["cold", *["warm"] * arguments.warm], starts, strict=True
    ):
        print(f"{name}: first step after {seconds:.1f} s, {memory:.2f} GB")
    cold, warm = starts[0][0], statistics.median(seconds for seconds, _ in starts[1:])
    print(f"warm / cold: {warm / cold:.2f}")


if __name__ == "__main__":
    main()
