"""Measure what a run's processes do together, for 2 to 64 of them on this machine.

    .venv/bin/python tests/bench/many_hosts.py --processes=2,4,8,16,32,64

Each process is a fork with one CPU device, and gloo carries their collectives. More
processes than cores wait for each other, so seconds of CPU count here and not those of
a clock, and how many files a process reads and writes. The first process has rows of
its own, because nobody can help it with its work. The last columns are a line through
the measured points, and its value at 1,024 processes: the hosts of 4,096 chips of v5p.
"""

import argparse
import gc
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
}

import jax
import numpy as np

from research.checkpoints import checksums
from research.checkpoints.checkpointer import Checkpointer
from research.config.knob_groups import CheckpointConfig, MeshConfig
from research.parallel import agreement, mesh, rendezvous
from research.parallel.process_discovery import Processes
from research.runs.control.request_listener import RequestListener

HOSTS = 1024
PATIENCE = 600.0  # seconds
CALLS = 20
ROWS = 64  # of the saved array, for each process
PARTS = (
    "rendezvous", "JAX's service", "first agreement", "agreement", "vote of a step",
    "save", "check a checkpoint",
)  # fmt: skip
COUNTED = "files read to check", "seals read to check", "files of a checkpoint"


class Meter:
    """Seconds of CPU that the threads of this process take for a part."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any], times: int = 1) -> Any:
        before = time.process_time()
        for _ in range(times):
            result = work()
        self.found[name] = (time.process_time() - before) / times
        return result


def one_process(index: int, count: int, ports: tuple[int, int], folder: Path) -> dict:
    """The measurements of process `index` of `count`."""
    meter = Meter()
    processes = Processes(f"localhost:{ports[0]}", count, index, "flags")
    meter("rendezvous", lambda: rendezvous.meet(processes, PATIENCE))
    address = f"localhost:{ports[1]}"
    meter(
        "JAX's service",
        lambda: jax.distributed.initialize(
            address, count, index, initialization_timeout=int(PATIENCE)
        ),
    )
    meter(
        "first agreement", lambda: agreement.together(lambda: 1, lambda _: {"a": "b"})
    )
    meter("agreement", lambda: agreement.everywhere(True), CALLS)
    devices = mesh.make_mesh(MeshConfig(data=1, fsdp=count))
    listener = RequestListener({}, devices)
    listener.agreed()
    meter("vote of a step", listener.agreed, CALLS)
    _checkpoint(meter, devices, folder)
    jax.distributed.shutdown()
    return meter.found


def _checkpoint(meter: Meter, devices: Any, folder: Path) -> None:
    rows = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("fsdp"))
    state = {
        "weights": jax.make_array_from_callback(
            (ROWS * devices.size, 64),
            rows,
            lambda where: np.ones((ROWS, 64), np.float32),
        )
    }
    read: list[Path] = []
    seals: list[Any] = []
    checksum, sum_of = checksums.checksum, checksums._sum_of
    config = CheckpointConfig()
    with Checkpointer(folder / "checkpoints", config, {"run": "many"}) as checkpointer:

        def save() -> None:
            checkpointer.save(1, state, {"batch": 1}, None)
            checkpointer.wait()

        meter("save", save)
        checksums.checksum = lambda path: read.append(path) or checksum(path)
        checksums._sum_of = lambda files: seals.append(files) or sum_of(files)
        meter("check a checkpoint", lambda: checkpointer.damage(1))
        meter.found["files read to check"] = len(read)
        meter.found["seals read to check"] = len(seals)
    files = [path for path in folder.rglob("*") if path.is_file()]
    meter.found["files of a checkpoint"] = len(files)


def measure(count: int) -> list[dict[str, float]]:
    """The measurements of `count` processes, in their order."""
    folder = Path(tempfile.mkdtemp())
    ports = _free_ports()
    children = []
    for index in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                found = one_process(index, count, ports, folder / "run")
                (folder / f"{index}.json").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} of {count} processes failed")
    found = [json.loads((folder / f"{i}.json").read_text()) for i in range(count)]
    shutil.rmtree(folder)
    return found


def _free_ports() -> tuple[int, int]:
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


def table(found: dict[int, list[dict[str, float]]]) -> list[str]:
    """Rows of Markdown: the first process, and the median of the others."""
    counts = sorted(found)
    names = (*PARTS, *COUNTED)
    head = ["", *map(str, counts), "each more", f"at {HOSTS:,}"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(counts) + 2)]
    for name in names:
        for who in ("first", "others"):
            values = [
                found[n][0][name]
                if who == "first"
                else float(np.median([each[name] for each in found[n][1:]]))
                for n in counts
            ]
            is_time = name in PARTS
            scale, unit = (1e3, "ms of CPU") if is_time else (1, "number")
            slope, start = np.polyfit(counts, np.array(values) * scale, 1)
            cells = [f"{value * scale:,.1f}" for value in values]
            cells += [f"{slope:,.3f}", f"{start + slope * HOSTS:,.0f}"]
            label = f"{name}, {who}, {unit}"
            lines.append("| " + " | ".join((label, *cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="2,4,8,16,32,64")
    flags = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    gc.freeze()  # A collection in a fork would copy the memory that it shares.
    found = {}
    for count in map(int, flags.processes.split(",")):
        begun = time.monotonic()
        found[count] = measure(count)
        seconds = time.monotonic() - begun
        print(f"{count} processes: {seconds:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
