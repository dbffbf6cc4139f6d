"""An alias: a folder beside the runs, whose file says for which checkpoint it stands.

A symbolic link could do half of this. But a link names a run and no step, so more
training would change what is served without a word; it keeps no history; a trainer
that is given the link trains in the run itself; and pages that confine paths to a
folder follow no links. A file can be replaced in one move, and a server that runs reads
it again when it looks for newer checkpoints.
"""

import dataclasses
import fcntl
import json
import logging
import os
from pathlib import Path

from research.checkpoints.checksums import seal_of
from research.checkpoints.needed_steps import need_step
from research.checkpoints.run_identity import BASE_RUN, BASE_STEP
from research.core.atomic_files import make_folder, write_whole
from research.core.errors import UserError
from research.core.json_files import read_json
from research.runs.lineage.start_pins import saved_step
from research.runs.run_directory import RUN, RunDir
from research.runs.utc_clock import utc_now

FILE, LOCK = "alias.json", "lock"
PROMOTION = {"run": str, "step": int, "checkpoint": str, "at": str, "by": str}
REMEDY = "promote a run again: --alias=FOLDER --run=RUN@STEP; the history is then new"


@dataclasses.dataclass(frozen=True)
class Promotion:
    """The checkpoint that an alias stood for from a time on.

    Attributes:
      run: run directory, relative to the folder of the alias where both lie in one.
      step: of the checkpoint.
      checkpoint: the sum of its checksums.
      at: ISO 8601, UTC.
      by: who promoted it; "" where nobody said.
    """

    run: str
    step: int
    checkpoint: str
    at: str
    by: str = ""

    def is_of(self, other: "Promotion") -> bool:
        """Whether both stand for the same checkpoint."""
        mine, its = (self.run, self.step), (other.run, other.step)
        return mine == its and self.checkpoint == other.checkpoint


def is_alias(folder: Path) -> bool:
    """Whether the folder is an alias."""
    return os.path.isfile(folder / FILE)


def history(alias: Path) -> list[Promotion]:
    """All promotions, the newest last; none without the file. Raises UserError."""
    shape = {"promotions": [PROMOTION]}
    found = read_json(alias / FILE, shape, REMEDY, absent={"promotions": []})
    names = {field.name for field in dataclasses.fields(Promotion)}
    return [
        Promotion(**{k: v for k, v in each.items() if k in names})
        for each in found["promotions"]
    ]


def folder_of(alias: Path, promotion: Promotion) -> Path:
    """The run directory of a promotion."""
    return Path(os.path.normpath(alias.absolute().parent / promotion.run))


def target(alias: Path) -> tuple[Path, int]:
    """The run and the step that an alias stands for now.

    Raises:
      UserError: it stands for nothing, or its checkpoint is gone or is another one.
    """
    promotions = history(alias)
    if not promotions:
        raise UserError(f"{alias} stands for no run yet: promote one")
    current = promotions[-1]
    folder = folder_of(alias, current)
    if problem := _problem(folder, current):
        raise UserError(f"{alias} stands for {folder}@{current.step}, but {problem}")
    return folder, current.step


def _problem(folder: Path, promotion: Promotion) -> str:
    """Why a promoted checkpoint cannot be used; "" if it can."""
    saved = RunDir(folder).checkpoints / str(promotion.step)
    if not saved.is_dir():
        return "it is not there: promote another one"
    if seal_of(saved) != promotion.checkpoint:
        return "the run has saved this step again since: promote it again to accept it"
    return ""


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
    if problem := _problem(folder, before[-1]):
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
