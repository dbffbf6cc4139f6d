"""Removal of a run: it moves to the trash of its root, from where it can return."""

import os
import shutil
import time
from pathlib import Path

from research.checkpoints.needed_steps import needed_steps
from research.checkpoints.stored_steps import size_of
from research.core.errors import UserError
from research.runs.control.job_logs import log_of
from research.studio.listing.run_index import is_run
from research.studio.listing.run_state import require_idle
from research.studio.roots import Roots

TRASH = ".trash"


def move_to_trash(roots: Roots, folder: Path) -> Path:
    """Moves a run, and its log, to the trash of its root; returns its new place.

    Raises:
      UserError: it is no run, it trains, or another run needs it.
      OSError: it cannot be moved.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is not a run directory, and stays")
    require_idle(folder)
    if needed := needed_steps(folder):
        step, by = next(iter(needed.items()))
        raise UserError(
            f"{folder} stays: the run in {by} is built on its step {step}; remove that "
            "one first"
        )
    name, _, below = roots.name(folder).partition("/")
    if not below:
        raise UserError(f"{folder} is a root of this studio, and stays")
    place = _trash_of(roots.folders[name]) / f"{time.time_ns():x}"
    (place / below).parent.mkdir(parents=True)
    os.rename(folder, place / below)
    log = log_of(folder)
    if log.is_file() and not log.is_symlink():
        os.rename(log, log_of(place / below))
    return place / below


def trash_size(roots: Roots) -> tuple[int, int]:
    """The number of runs in the trash, and their bytes. Raises UserError: a link."""
    places = _places(roots)
    return len(places), sum(map(size_of, places))


def empty_trash(roots: Roots) -> None:
    """Deletes what is in the trash. A link there goes, and its target stays.

    Raises:
      UserError: the trash itself is a link; then nothing is deleted.
      OSError: something cannot be deleted.
    """
    for place in _places(roots):
        if place.is_symlink() or not place.is_dir():
            place.unlink()
        else:
            shutil.rmtree(place)


def _places(roots: Roots) -> list[Path]:
    trashes = [_trash_of(root) for root in roots.folders.values()]
    return [place for trash in trashes for place in sorted(trash.glob("*"))]


def _trash_of(root: Path) -> Path:
    trash = root / TRASH
    if trash.is_symlink():
        raise UserError(
            f"{trash} is a link, and the studio deletes nothing behind a link: put a "
            "folder in its place"
        )
    return trash
