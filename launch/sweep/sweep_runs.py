"""The runs of a sweep, each with its folder, config and command; and `sweep.json`."""

import dataclasses
import itertools
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from launch.jobs.launch_job import check_training_flags
from launch.sweep.sweep_spec import Axis, Sweep
from research.config.command_line import last_of_each
from research.config.cross_knob_rules import idle
from research.config.field_names import flag
from research.config.knobs import changed, flat
from research.config.run_config import Config, with_effect, with_length
from research.core.atomic_files import write_whole
from research.core.errors import UserError, nearest
from research.core.json_files import read_json
from research.runs.run_directory import is_complete

HOLD_OUT = "see config.data.held_out (of raw text config.text.held_out_share)"
# Knobs that a sweep sets for each run.
OWN = ("seed", "run_dir")
LENGTH = {"steps", "epochs"}  # Only one of them can be set.
SHAPE = {
    "metric": str,
    "question": str,
    "file": str,
    "axes": [{"name": str, "points": dict}],
    "shared": [str],
    "baseline": [str],
    "runs": [
        {
            "name": str,
            "point": [str],
            "seed": int,
            "steps": int | None,
            "command": [str],
        }
    ],
}


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
      point: its label on each axis.
      changes: knobs in which it differs from the config that all runs share.
      shared: trainer flags that all runs have.
    """

    name: str
    point: tuple[str, ...]
    changes: Mapping[str, Any]
    config: Config
    shared: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of `research.train` that train this run alone."""
        own = (flag(*change) for change in self.changes.items())
        return last_of_each([*self.shared, *own])

    @property
    def command(self) -> list[str]:
        """The command that trains this run alone."""
        return ["python", "-m", "research.train", *self.flags]

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def is_done(self) -> bool:
        return is_complete(self.folder)


def expand(sweep: Sweep, folder: Path, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """All runs, point by point, and each point's seeds in turn.

    `folder` is the parent of the run directories; `overrides` are
    `--config.KNOB=VALUE` for all runs.

    Raises:
      UserError: an axis, seed or override is wrong, or two runs have the same name.
    """
    _check(sweep)
    given = check_training_flags([f"--config={sweep.config}", *overrides])
    changes = with_length(given, _without_overridden(sweep, overrides))
    shared = (
        f"--config={sweep.config}",
        *(flag(*change) for change in changes.items()),
        *overrides,
    )
    base = changed(given, changes, "the sweep's changes")
    runs = []
    for labels in itertools.product(*(axis.points for axis in sweep.axes)):
        point: dict[str, Any] = {}
        for axis, label in zip(sweep.axes, labels, strict=True):
            point |= axis.points[label]
        for seed in sweep.seeds:
            name = _name(sweep.axes, labels, seed)
            own = {**with_length(base, point), "seed": seed}
            own["run_dir"] = str(folder / name)
            where = f"run {name} of the sweep"
            own |= _resets(base, changed(base, own, where), point)
            made = with_effect(base, own, where)
            if not made.evaluates:
                raise UserError(
                    f"{where} holds out no rows, and its metric, {sweep.metric!r}, is "
                    f"measured on them: {HOLD_OUT}"
                )
            runs.append(SweepRun(name, labels, own, made, shared))
    _require_distinct(runs)
    _require_effects(base, runs)
    return runs


def _resets(base: Config, run: Config, point: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of knobs that the sweep sets, and that have no effect in `run`.

    A knob that the point itself sets is none of them: the run is refused for it.
    """
    set_to, unset = flat(base), flat(Config())
    names = [x for x in idle(run) if x not in point and set_to[x] != unset[x]]
    return {name: unset[name] for name in names}


def _require_effects(base: Config, runs: Sequence[SweepRun]) -> None:
    """Raises UserError for a knob that the sweep sets and that acts in no run."""
    everywhere = set.intersection(*(set(idle(run.config)) for run in runs))
    own = {k: v for k, v in runs[0].changes.items() if k not in everywhere}
    with_effect(base, own, "the sweep")


def _check(sweep: Sweep) -> None:
    owners: dict[str, str] = {}
    for axis in sweep.axes:
        if len(axis.points) < 2:
            raise UserError(
                f"axis {axis.name!r} has {len(axis.points)} value(s): there is nothing "
                "to compare; give two or more, or move it to the sweep's changes"
            )
        for knob in {knob for point in axis.points.values() for knob in point}:
            if knob in OWN:
                raise UserError(f"axis {axis.name!r} varies {knob!r}: use seeds=")
            if owners.setdefault(knob, axis.name) != axis.name:
                raise UserError(
                    f"axes {owners[knob]!r} and {axis.name!r} both vary {knob!r}"
                )
    names = [axis.name for axis in sweep.axes]
    if not names or len(set(names)) < len(names):
        raise UserError(f"the axes are {names}: name one or more, each once")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"the seeds are {list(sweep.seeds)}: give each once")
    metrics = ("loss", "bits_per_byte", "loss/CATEGORY")
    if sweep.metric not in metrics and not sweep.metric.startswith(
        ("loss/", "by_group.")  # The second is the first in earlier versions.
    ):
        raise UserError(
            f"the metric {sweep.metric!r} is none of {', '.join(metrics)}"
            f"{nearest(sweep.metric, metrics)}"
        )
    baseline(sweep)


def baseline(sweep: Sweep) -> tuple[str, ...]:
    """The point that all others are compared with, as one label per axis.

    Raises:
      UserError: it names an axis or a label that does not exist.
    """
    names = [axis.name for axis in sweep.axes]
    for name in sweep.baseline:
        if name not in names:
            raise UserError(f"the baseline names {name!r}{nearest(name, names)}")
    labels = []
    for axis in sweep.axes:
        label = sweep.baseline.get(axis.name, next(iter(axis.points)))
        if label not in axis.points:
            raise UserError(
                f"the baseline has {axis.name}={label!r}{nearest(label, axis.points)}; "
                f"the axis has {', '.join(axis.points)}"
            )
        labels.append(label)
    return tuple(labels)


def _without_overridden(sweep: Sweep, overrides: Sequence[str]) -> dict[str, Any]:
    """The sweep's changes without the knobs that the command line sets."""
    varied = {k for axis in sweep.axes for point in axis.points.values() for k in point}
    given = set()
    for override in overrides:
        name, equals, _ = override.partition("=")
        knob = name.removeprefix("--config.")
        if knob == name or not equals:
            raise UserError(
                f"{override!r} does not fit a sweep: write --config.KNOB=VALUE"
            )
        if knob in varied:
            raise UserError(f"{override!r}: that knob is an axis of the sweep")
        if knob in OWN:
            raise UserError(
                f"{override!r}: each run has its own; see --seeds and --folder"
            )
        given.add(knob)
    if given & LENGTH:
        given |= LENGTH
    return {knob: v for knob, v in sweep.changes.items() if knob not in given}


def _name(axes: Sequence[Axis], labels: Sequence[str], seed: int) -> str:
    parts = [
        f"{axis.name.rpartition('.')[2]}-{label}"
        for axis, label in zip(axes, labels, strict=True)
    ]
    plain = [re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.") for part in parts]
    return "_".join([*plain, f"seed-{seed}"])


def _require_distinct(runs: Sequence[SweepRun]) -> None:
    seen: dict[str, SweepRun] = {}
    for run in runs:
        # Some file systems ignore the case of letters.
        other = seen.setdefault(run.name.casefold(), run)
        if other is not run:
            raise UserError(
                f"two runs are called {run.name!r}: {other.point} and {run.point}; "
                "choose labels that differ in letters and digits"
            )


def check_folder(folder: Path, sweep: Sweep, runs: Sequence[SweepRun]) -> None:
    """Refuses a folder whose runs cannot be compared with these.

    A report takes means over the runs of a folder. The runs may gain seeds and values
    of an axis, but their shared config and the meaning of each name and label must not
    change.

    Raises:
      UserError: one of them differs.
    """
    if not os.path.lexists(folder / "sweep.json"):
        return
    known = read(folder)
    before = {x["name"]: x["command"] for x in known["runs"]}
    points = {axis["name"]: axis["points"] for axis in known["axes"]}
    found = ""
    if points.keys() != {axis.name for axis in sweep.axes}:
        found = f"over {', '.join(points)}"
    elif known["shared"] != [*runs[0].shared]:
        found = f"whose runs share {shlex.join(known['shared'])}"
    for axis in sweep.axes:
        for label, changes in points.get(axis.name, {}).items():
            own = axis.points.get(label, changes)
            if json.dumps(own) != json.dumps(changes):
                found = f"in which {axis.name}={label} is {changes}"
    for run in runs:
        if before.get(run.name, run.command) != run.command:
            found = f"in which {run.name} is {shlex.join(before[run.name])}"
    if found:
        raise UserError(
            f"{folder} holds a sweep {found}: choose another --folder, or remove it"
        )


def write(folder: Path, sweep: Sweep, file: str, runs: Sequence[SweepRun]) -> None:
    """Writes `sweep.json`, which the report reads in addition to the runs' folders.

    Runs of the same points with other seeds stay in its list.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Other workers may read and write the same file at the same time.
    with filelock.FileLock(folder / "sweep.json.lock"):
        check_folder(folder, sweep, runs)
        content = _merged(folder, sweep, file, runs)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_whole(folder / "sweep.json", text)


def _merged(
    folder: Path, sweep: Sweep, file: str, runs: Sequence[SweepRun]
) -> dict[str, Any]:
    listed = {
        run.name: {
            "name": run.name,
            "point": run.point,
            "seed": run.config.seed,
            "steps": None if run.config.epochs else run.config.steps,
            "command": run.command,
        }
        for run in runs
    }
    known = read(folder)["runs"] if os.path.lexists(folder / "sweep.json") else []
    points = {run.point for run in runs}
    for run in known:
        if tuple(run["point"]) in points:
            listed.setdefault(run["name"], run)
    return {
        "file": file,
        "question": sweep.question,
        "metric": sweep.metric,
        "axes": [dataclasses.asdict(axis) for axis in sweep.axes],
        "shared": runs[0].shared,
        "baseline": baseline(sweep),
        "seeds": sorted({run["seed"] for run in listed.values()}),
        "runs": list(listed.values()),
    }


def failure_of(folder: Path, name: str) -> Path:
    """The file with the exit code of a run that has failed, and its last message."""
    return folder / "claims" / f"{name}.failed"


def read(folder: Path) -> dict[str, Any]:
    """Reads `sweep.json`.

    Raises:
      UserError: there is none, or it holds something else.
    """
    return read_json(
        folder / "sweep.json",
        SHAPE,
        "name the folder of a sweep, or restore a copy; if you remove the file, the "
        "command of the sweep writes it anew",
    )
