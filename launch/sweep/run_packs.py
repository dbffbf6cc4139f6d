"""Groups the runs of a sweep into packs; one command trains the runs of a pack."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.launch_job import LaunchJob
from launch.sweep.sweep_runs import SweepRun
from research.train.together import compatibility


@dataclasses.dataclass(frozen=True)
class RunPack:
    """Runs that train as one program, and the job that trains them."""

    runs: tuple[SweepRun, ...]
    job: LaunchJob

    @property
    def is_done(self) -> bool:
        return all(run.is_done for run in self.runs)


def make_packs(runs: Sequence[SweepRun], most: int, folder: Path) -> list[RunPack]:
    """Puts all runs into as few packs as possible, of at most `most` runs each.

    The packs do not depend on which runs are done, so that workers that start later
    make the same packs.
    """
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        alone = most == 1 or compatibility.why_alone(run.config)
        key = run.name if alone else repr(compatibility.shared(run.config))
        groups.setdefault(key, []).append(run)
    packs = []
    for group in groups.values():
        # Packs of equal size end at about the same time.
        count = math.ceil(len(group) / most)
        size = math.ceil(len(group) / count)
        packs += [
            _pack(tuple(group[begin : begin + size]), folder)
            for begin in range(0, len(group), size)
        ]
    return packs


def _pack(runs: tuple[SweepRun, ...], folder: Path) -> RunPack:
    first, more = runs[0], len(runs) - 1
    # The name starts with the sweep's, because queues show jobs of many sweeps.
    name = f"{folder.name} {first.name}{f' and {more} more' if more else ''}"
    beside = folder / "logs" / first.name
    if not more:
        return RunPack(runs, LaunchJob(name, first.flags, first.config, beside=beside))
    changes = json.dumps([dict(run.changes) for run in runs], ensure_ascii=False)
    # The fit check uses the config of the run that needs most memory.
    largest = max(runs, key=lambda run: run.config.lora.rank)
    job = LaunchJob(
        name,
        (*first.shared, f"--runs={changes}"),
        largest.config,
        module="research.train.together",
        beside=beside,
    )
    return RunPack(runs, job)
