"""All run directories below the roots, from a cache that the times of files check."""

import dataclasses
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from research.checkpoints.stored_steps import size_of
from research.runs import metrics_file
from research.studio.listing.run_notes import NAME as NOTES
from research.studio.listing.run_notes import read_notes
from research.studio.listing.run_state import HeldLocks, RunState, read_state
from research.studio.roots import Roots

DEEPEST = 4  # folders between a root and a run, such as those of sweeps
# Together these mark a folder as a run directory, and not as another model.
MARKS = ("config.json", "identity.json")
WATCHED = ("run.json", metrics_file.NAME, "complete.json", "config.json", NOTES)
# A list takes so long for the sizes of runs at most; it shows the others next time.
SIZE_TIME = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class ListedRun:
    """A run in a list.

    Attributes:
      name: its path as addresses have it, see `Roots`.
      folder: where it is.
      size: bytes on disk; None where they are not counted yet.
    """

    name: str
    folder: Path
    state: RunState
    tags: tuple[str, ...]
    notes: str
    size: int | None


class RunIndex:
    """The runs below some roots. Used by one thread at a time."""

    def __init__(self, roots: Roots):
        self._roots = roots
        self._known: dict[Path, tuple[object, RunState, list[str], str]] = {}
        self._sizes: dict[Path, tuple[object, int]] = {}

    def runs(self) -> list[ListedRun]:
        """All runs, the one that changed last first."""
        locks, found, limit = HeldLocks(), [], time.monotonic() + SIZE_TIME
        for name, folder in self._folders():
            is_training = locks.holds(folder)
            mark = (is_training, *(_mark(folder / x) for x in WATCHED))
            known = self._known.get(folder)
            if known is None or known[0] != mark or known[1].state == "running":
                state = read_state(folder, is_training=is_training)
                known = self._known[folder] = (mark, state, *read_notes(folder))
            _, state, tags, notes = known
            size = self._size(folder, mark, limit)
            found.append(ListedRun(name, folder, state, tuple(tags), notes, size))
        for gone in self._known.keys() - {run.folder for run in found}:
            del self._known[gone]
            self._sizes.pop(gone, None)
        return sorted(found, key=lambda run: -run.state.changed)

    def _size(self, folder: Path, mark: object, limit: float) -> int | None:
        mark = (mark, _mark(folder), _mark(folder / "checkpoints"))
        known = self._sizes.get(folder)
        if (known is None or known[0] != mark) and time.monotonic() < limit:
            known = self._sizes[folder] = (mark, size_of(folder))
        return known[1] if known else None

    def _folders(self) -> Iterator[tuple[str, Path]]:
        for name, root in self._roots.folders.items():
            yield from _runs_below(name, root, DEEPEST)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return all(os.path.isfile(folder / mark) for mark in MARKS)


def _runs_below(name: str, folder: Path, depth: int) -> Iterator[tuple[str, Path]]:
    """Runs in a folder. Links are not followed, and names with a dot are hidden."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if names.issuperset(MARKS):
        yield name, folder
        return
    for entry in entries:
        if entry.name.startswith(".") or not depth:
            continue
        if entry.is_dir(follow_symlinks=False) and _is_text(entry.name):
            yield from _runs_below(f"{name}/{entry.name}", Path(entry.path), depth - 1)


def _is_text(name: str) -> bool:
    """Whether it is a name that an address can carry."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    return found.st_ino, found.st_mtime_ns, size
