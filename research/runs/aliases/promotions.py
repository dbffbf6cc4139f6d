"""Moves an alias to a checkpoint, which training and `prune` then keep."""

import dataclasses
import fcntl
import json
import logging
import os
from pathlib import Path

from research.checkpoints.needed_steps import need_step
from research.checkpoints.run_identity import BASE_RUN, BASE_STEP
from research.checkpoints.stored_steps import seal_of
from research.core.atomic_files import make_folder, write_whole
from research.core.errors import UserError
from research.runs.aliases.run_alias import (
    FILE,
    Promotion,
    folder_of,
    history,
    problem_of,
)
from research.runs.lineage.start_pins import saved_step
from research.runs.run_directory import RUN, RunDir
from research.runs.utc_clock import utc_now

LOCK = "lock"


def promote(alias: Path, run: Path, step: str = "latest", by: str = "") -> Promotion:
    """Lets an alias stand for a checkpoint, which training and `prune` then keep.

    So they keep the one before it, to which the alias can be moved back.

    Args:
      alias: its folder is made where there is none.
      run: run directory.
      step: latest, best, or a number.
      by: who does it.

    Raises:
      UserError: there is no such checkpoint, or `alias` is something else.
      OSError: a folder cannot be written.
    """
    folder = RunDir(run)
    if not folder.is_run:
        raise UserError(f"{run} is no run directory")
    number = saved_step(folder, step)
    return _add(alias, run, number, by)


def back(alias: Path, by: str = "") -> Promotion:
    """Lets an alias stand again for what it stood for before.

    Raises:
      UserError: it has stood for nothing else, or that is gone.
      OSError: a folder cannot be written.
    """
    promotions = history(alias)
    before = [x for x in promotions if not x.is_of(promotions[-1])]
    if not before:
        raise UserError(f"{alias} has stood for nothing else, so there is no way back")
    folder = folder_of(alias, before[-1])
    if problem := problem_of(folder, before[-1]):
        raise UserError(f"{alias} stood for {folder}@{before[-1].step}, but {problem}")
    return _add(alias, folder, before[-1].step, by)


def _add(alias: Path, run: Path, step: int, by: str) -> Promotion:
    place = alias.absolute().parent
    folder = RunDir(run)
    saved = seal_of(folder.checkpoints / str(step))
    path = run.absolute()
    written = path.relative_to(place) if path.is_relative_to(place) else path
    new = Promotion(str(written), step, saved, utc_now(), by)
    others = os.path.isdir(alias) and {*os.listdir(alias)} - {FILE, LOCK}
    if others or (os.path.lexists(alias) and not os.path.isdir(alias)):
        raise UserError(f"{alias} is something else already; choose another name")
    make_folder(alias)
    with open(alias / LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        promotions = [*history(alias), new]
        before = [x for x in promotions if not x.is_of(new)][-1:]
        needs = []
        for each in (*before, new):
            base = RunDir(folder_of(alias, each))
            if base.is_run:
                named = {BASE_RUN: base.origin().get(RUN, "")}
                needs.append(named | {BASE_STEP: str(each.step)})
                _keep(base.path, alias, needs[-1])
        kept = [dataclasses.asdict(x) for x in promotions]
        content = {"promotions": kept, "needs": needs}
        write_whole(alias / FILE, json.dumps(content, indent=2))
    return new


def _keep(run: Path, alias: Path, need: dict[str, str]) -> None:
    try:
        need_step(run, alias, need, FILE)
    except OSError as error:
        logging.warning(
            "%s cannot be told that %s needs its step %s (%s): more training there or "
            "a prune may remove it",
            *(run, alias, need[BASE_STEP], error),
        )
