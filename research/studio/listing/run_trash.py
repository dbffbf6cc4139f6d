"""Removal of a run: it moves to the trash of its root, from where it can return."""

import os
import shutil
import time
from pathlib import Path

from research.checkpoints.needed_steps import needed_steps
from research.core.errors import UserError
from research.studio.jobs.job_logs import log_of
from research.studio.listing.run_index import is_run
from research.studio.listing.run_state import HeldLocks
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
    if HeldLocks().holds(folder):
        raise UserError(f"{folder} is being trained in: stop it first")
    if needed := needed_steps(folder):
        step, by = next(iter(needed.items()))
        raise UserError(
            f"{folder} stays: the run in {by} is built on its step {step}; remove that "
            "one first"
        )
    name, _, below = roots.name(folder).partition("/")
    if not below:
        raise UserError(f"{folder} is a root of this studio, and stays")
    place = roots.folders[name] / TRASH / f"{time.time_ns():x}"
    (place / below).parent.mkdir(parents=True)
    os.rename(folder, place / below)
    log = log_of(folder)
    if log.is_file() and not log.is_symlink():
        os.rename(log, log_of(place / below))
    return place / below


def empty_trash(roots: Roots) -> int:
    """Deletes what is in the trash; returns the number of runs. Raises OSError."""
    count = 0
    for root in roots.folders.values():
        for place in sorted((root / TRASH).glob("*")):
            count += 1
            shutil.rmtree(place)
    return count
