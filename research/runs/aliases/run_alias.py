"""An alias: a folder beside the runs, whose file says for which checkpoint it stands.

A symbolic link could do half of this. But a link names a run and no step, so more
training would change what is served without a word; it keeps no history; a trainer
that is given the link trains in the run itself; and pages that confine paths to a
folder follow no links. A file can be replaced in one move, and a server that runs reads
it again when it looks for newer checkpoints. Imports no JAX, for pages.
"""

import dataclasses
import os
from pathlib import Path

from research.checkpoints.stored_steps import seal_of
from research.core.errors import UserError
from research.core.json_files import read_json
from research.runs.run_directory import RunDir

FILE = "alias.json"
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
    if problem := problem_of(folder, current):
        raise UserError(f"{alias} stands for {folder}@{current.step}, but {problem}")
    return folder, current.step


def problem_of(folder: Path, promotion: Promotion) -> str:
    """Why a promoted checkpoint cannot be used; "" if it can."""
    saved = RunDir(folder).checkpoints / str(promotion.step)
    if not saved.is_dir():
        return "it is not there: promote another one"
    if seal_of(saved) != promotion.checkpoint:
        return "the run has saved this step again since: promote it again to accept it"
    return ""
