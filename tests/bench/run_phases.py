"""A training run by phase: seconds by the clock, seconds of CPUs, and peak memory.

    python tests/bench/run_phases.py [--whole] [--times=1] [-- --config=FILE.py ...]
    python tests/bench/run_phases.py --runs=RUNS.json [--at_once=8] ...

Runs the real command in an empty run directory until its first update has been
computed, or to its end. With --runs it is `research.train.together` instead. A phase is
a function of the code by name, without the parts of it that are phases themselves; the
seconds of CPUs are those of all threads. A step that computes while the next thing
begins is charged to that. The compile cache is the user's, so the second call is a warm
one.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
FIT, PREPARE = "research.train.fit_runs", "research.train.prepare_runs"
FINISH, TOP = "research.train.finish_run", "research.train.start_to_report"
PASS, HF = "_TrainingPass", "research.formats.huggingface.huggingface"
# Label, module and attribute, in the order in which a run meets them.
PHASES = (
    ("devices", "research.parallel.runtime", "start"),
    ("base model opened", PREPARE, "_open_base"),
    ("its sum", "research.formats.gguf.gguf_file", "fingerprint_files"),
    ("rows", PREPARE, "_load"),
    ("optimizer state", PREPARE, "_start"),
    ("adapters", PREPARE, "load_start"),
    ("weights", "research.train.step.definition_from_config", "load_frozen"),
    ("doctor: rows", "research.train.doctor", "examine"),
    ("doctor: model", "research.train.doctor", "examine_model"),
    ("run directory", TOP, "claim"),
    ("checkpoints opened", TOP, "open_checkpoints"),
    ("restore", TOP, "restore"),
    ("run directory", TOP, "record_start"),
    ("evaluation", FIT, f"{PASS}._evaluation"),
    ("evaluation", FIT, "sum_batches"),
    ("steps", FIT, f"{PASS}._log"),
    ("saves", FIT, f"{PASS}._save"),
    ("saves", FIT, f"{PASS}._save_best"),
    ("saves", FIT, f"{PASS}._save_last"),
    ("samples", FIT, f"{PASS}._sample"),
    ("export: written", FINISH, "_export"),
    ("export: read back", f"{HF}_export", "HuggingFaceFormat.read_back"),
    ("export: proof", "research.runs.lineage.exported_run", "prove"),
    ("answers", FINISH, "_answer"),
    ("report", FINISH, "_finish"),
)  # fmt: skip
IMPORTS, OTHER = "interpreter and imports", "between the phases"
BEGUN, COMPUTED = "first step begun", "first step computed"
# JAX's own events, as it names them, and what they are.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered",
    "/jax/core/compile/backend_compile_duration": "compiled, or read from the cache",
}


class Phases:
    """Charges seconds and memory to one phase at a time."""

    def __init__(self, age: float):
        self.clock: collections.Counter[str] = collections.Counter()
        self.cpu: collections.Counter[str] = collections.Counter()
        self.peak: collections.Counter[str] = collections.Counter()
        self._stack = [IMPORTS]
        self._since = time.perf_counter() - age, 0.0

    def charge(self) -> None:
        """Charges what was used since the last call to the current phase."""
        name, now = self._stack[-1], (time.perf_counter(), time.process_time())
        self.clock[name] += now[0] - self._since[0]
        self.cpu[name] += now[1] - self._since[1]
        self.peak[name] = max(self.peak[name], peak_bytes())
        self._since = now

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        self.charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self.charge()
            self._stack.pop()

    def leave_imports(self) -> None:
        self.charge()
        self._stack = [OTHER]

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.during(name):
                return function(*args, **kwargs)

        return call


def peak_bytes() -> int:
    """The most memory of this process since the last call, or now without Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(found) * 1024


def count_events() -> dict[str, list[float]]:
    """Numbers and seconds of JAX's events, which grow from now on."""
    import jax

    found: dict[str, list[float]] = {name: [0, 0.0] for name in EVENTS.values()}

    def note(event: str, seconds: float, **_: Any) -> None:
        if event in EVENTS:
            found[EVENTS[event]][0] += 1
            found[EVENTS[event]][1] += seconds

    jax.monitoring.register_event_duration_secs_listener(note)
    return found


def put_in(phases: Phases) -> None:
    """Lets the functions of `PHASES` charge themselves."""
    for label, module, path in PHASES:
        *holders, name = path.split(".")
        owner = functools.reduce(getattr, holders, importlib.import_module(module))
        setattr(owner, name, phases.measured(label, getattr(owner, name)))


def run(out: Path, whole: bool, runs: str, at_once: int, argv: list[str]) -> None:
    """The command itself, in this process, which ends here."""
    phases = Phases(time.time() - psutil.Process().create_time())
    from research.config import command_line

    config, _ = command_line.parse_with_config(
        ["research.train", *argv], "", command_line.NoFlags
    )
    configs = [config]
    if runs:
        from research.train.together.__main__ import read_runs

        configs = [
            dataclasses.replace(own, run_dir=f"{config.run_dir}-{number}")
            for number, own in enumerate(read_runs(runs, config))
        ]
    from research.train.start_to_report import train

    phases.leave_imports()
    programs = count_events()
    put_in(phases)

    import jax

    from research.parallel import runtime

    def end() -> None:
        phases.charge()
        found = [phases.clock, phases.cpu, phases.peak, programs]
        out.write_text(json.dumps(found))
        os._exit(0)

    announce = runtime.announce_first_call

    def announced(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        call, first = phases.measured("steps", announce(function, name)), True

        def step(*args: Any) -> Any:
            nonlocal first
            if not first:
                return call(*args)
            first = False
            with phases.during(BEGUN):
                function.lower(*args).compile()
            with phases.during(COMPUTED):
                result = jax.block_until_ready(call.__wrapped__(*args))
            if not whole:
                end()
            return result

        return step

    runtime.announce_first_call = announced
    train(configs, at_once)
    end()


def measure(flags: list[str], argv: list[str]) -> list[dict[str, Any]]:
    """Runs the command once in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "phases.json"
        command = [sys.executable, __file__, f"--into={out}", *flags]
        own = [f"--config.run_dir={folder}/run"]
        subprocess.run([*command, "--", *argv, *own], cwd=ROOT, check=True)
        return json.loads(out.read_text())


def show(clock: Any, cpu: Any, peak: Any, programs: Any) -> None:
    print(f"{'phase':<26}{'clock s':>9}{'CPU s':>9}{'peak GB':>9}")
    for name, seconds in clock.items():
        print(f"{name:<26}{seconds:9.2f}{cpu[name]:9.2f}{peak[name] / 1e9:9.2f}")
    total = sum(clock.values()), sum(cpu.values()), max(peak.values()) / 1e9
    print("{:<26}{:9.2f}{:9.2f}{:9.2f}".format("all", *total))
    for name, (count, seconds) in programs.items():
        print(f"programs {name}: {count:,.0f} in {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--whole", action="store_true", help="to the end of the run")
    parser.add_argument("--runs", default="", help="as of research.train.together")
    parser.add_argument("--at_once", type=int, default=0, help="of the same")
    parser.add_argument("--times", type=int, default=1, help="runs in turn")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("knobs", nargs="*", help="arguments of research.train")
    arguments = parser.parse_args()
    knobs = arguments.knobs or ["--config=configs/finetune_dolly.py"]
    if arguments.into:
        pack = arguments.runs, arguments.at_once
        run(arguments.into, arguments.whole, *pack, knobs)
    flags = [f"--runs={arguments.runs}", f"--at_once={arguments.at_once}"]
    flags += ["--whole"] * arguments.whole
    for _ in range(arguments.times):
        show(*measure(flags, knobs))


if __name__ == "__main__":
    main()
