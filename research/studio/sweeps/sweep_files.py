"""Sweeps below the roots: a list of all, and the state of one from its files."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.json_files import NUMBER, read_json
from research.studio.listing.run_index import ListedRun
from research.studio.listing.run_state import RunState

FILE, REPORT = "sweep.json", "report.json"
SHAPE = {
    "question": str,
    "metric": str,
    "axes": [{"name": str}],
    "runs": [{"name": str, "point": [str], "seed": int}],
}


def _shape_of_report(value: Any) -> dict[str, Any]:
    best = isinstance(value, dict) and value.get("best")
    run = {"words": str, "flags": str, "run": str, "value": NUMBER}
    return {
        "done": int,
        "count": int,
        "header": [str],
        "rows": [[str]],
        "origins": dict,
        "best": run if best else type(None),
    }


@dataclasses.dataclass(frozen=True)
class SweptRun:
    """A run of a sweep.

    Attributes:
      name: its path as addresses have it; empty before it has begun.
      title: its name within the sweep.
      state: None before it has begun.
    """

    name: str
    title: str
    point: tuple[str, ...]
    seed: int
    state: RunState | None


@dataclasses.dataclass(frozen=True)
class ShownSweep:
    """A sweep as its files tell it.

    Attributes:
      sweep: the content of `sweep.json`.
      runs: in the order of the file.
      report: the content of `report.json`; empty before the first.
      reported: when that was written, seconds since 1970.
      problem: why a file cannot be read.
    """

    sweep: dict[str, Any]
    runs: tuple[SweptRun, ...]
    report: dict[str, Any]
    reported: float
    problem: str

    @property
    def is_running(self) -> bool:
        return any(run.state and run.state.state == "running" for run in self.runs)


def sweep_folders(runs: Sequence[ListedRun]) -> list[tuple[str, Path]]:
    """Name and folder of each sweep that has a run, the one that changed last first."""
    found: dict[Path, str] = {}
    for run in runs:
        folder = run.folder.parent
        file = folder / FILE
        if folder not in found and file.is_file() and not file.is_symlink():
            found[folder] = run.name.rpartition("/")[0]
    return [(name, folder) for folder, name in found.items() if name]


def read_sweep(
    name: str,
    find: Callable[[str], Path],
    state_of: Callable[[Path], RunState],
) -> ShownSweep:
    """Reads a sweep and the states of its runs.

    Args:
      name: of its folder, as addresses have it.
      find: the path of such a name; raises PageError where it leads out.
      state_of: the state of a run.

    Raises:
      UserError: `sweep.json` holds something else.
      PageError: there is none.
    """
    sweep = read_json(find(f"{name}/{FILE}"), SHAPE, "name the folder of a sweep")
    folder, runs = find(name), []
    for each in sweep["runs"]:
        title = each["name"]
        # A name of one folder: nothing else is a run of this sweep.
        is_there = "/" not in title and (folder / title / "config.json").is_file()
        place = find(f"{name}/{title}") if is_there else None
        state = state_of(place) if place else None
        shown = f"{name}/{title}" if place else ""
        runs.append(SweptRun(shown, title, tuple(each["point"]), each["seed"], state))
    report, problem, reported = {}, "", 0.0
    if (folder / REPORT).exists():
        file = find(f"{name}/{REPORT}")
        try:
            report = read_json(file, _shape_of_report, "make the report again")
            reported = file.stat().st_mtime
        except UserError as error:
            problem = str(error)
    return ShownSweep(sweep, tuple(runs), report, reported, problem)
