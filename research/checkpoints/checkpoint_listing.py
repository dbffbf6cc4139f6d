"""The checkpoints of a run: size, loss, damage, and which ones can be removed."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from research.checkpoints.checksums import find_damage, saving_run
from research.checkpoints.disk_space import size_of
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved step.

    Attributes:
      step: optimizer updates it holds.
      folder: its folder.
      size: bytes on disk.
      saved: local time of the save.
      loss: held-out loss of exactly these parameters, if it was measured.
      data: fingerprint of the data of the run at that time, held-out rows included.
      damage: one line per damaged file; empty if the checkpoint is intact.
    """

    step: int
    folder: Path
    size: int
    saved: datetime.datetime
    loss: float | None
    data: str
    damage: tuple[str, ...]


def inspect(folder: Path, run: str = "") -> list[Checkpoint]:
    """Lists all checkpoints in `folder`, oldest first, and reads every byte of them.

    Those that another run than `run` has saved count as damaged.

    Raises:
      UserError: see `refuse_other_identity`.
    """
    refuse_other_identity(folder, run)
    return [_inspect_one(path, run) for path in step_folders(folder)]


def step_folders(folder: Path) -> list[Path]:
    """The folders of committed steps, oldest first; none if `folder` does not exist."""
    steps = [x for x in folder.glob("*") if _is_step(x.name) and x.is_dir()]
    return sorted(steps, key=lambda x: int(x.name))


def _is_step(name: str) -> bool:
    """Whether it is a step as a save writes it: 7, not 007 or digits of other scripts.

    Whoever has the number finds the folder by it.
    """
    return name.isdecimal() and str(int(name)) == name


def refuse_other_identity(folder: Path, run: str) -> None:
    """Refuses checkpoints that all name one run, if it is not `run`.

    The identity of the run has then changed, and the checkpoints are whole.

    Raises:
      UserError: names the file of the identity and both runs.
    """
    runs = {saving_run(step) for step in step_folders(folder)} - {None}
    if run and len(runs) == 1 and run not in runs:
        raise UserError(
            f"{folder.parent / 'identity.json'} names run {run}, and all checkpoints "
            f"in {folder} are of run {runs.pop() or 'without an id'}; nothing was "
            "moved: restore a copy of the file (meta/metadata in each checkpoint holds "
            "the same as `identity`), or the checkpoints of this run"
        )


def _inspect_one(folder: Path, run: str) -> Checkpoint:
    damage = tuple(find_damage(folder, run=run))
    metrics, loss, data = folder / "metrics" / "metrics", None, ""
    if not damage:
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        data = meta["identity"].get("data", "")
        if metrics.is_file():
            loss = json.loads(metrics.read_bytes())["loss"]
    saved = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
    size = size_of(folder)
    return Checkpoint(int(folder.name), folder, size, saved, loss, data, damage)


def superfluous(
    found: Sequence[Checkpoint], keep_last: int, keep_best: int
) -> list[Checkpoint]:
    """The checkpoints to remove: all but the newest `keep_last` and best `keep_best`.

    Damaged checkpoints do not count and are removed: they can never be restored. A
    loss is compared only with others on the data of the newest checkpoint.
    """
    whole = [x for x in found if not x.damage]
    same_data = [x for x in whole if x.data == whole[-1].data]
    measured = [x for x in same_data if x.loss is not None]
    measured.sort(key=lambda x: x.loss)
    kept = [*whole[max(len(whole) - keep_last, 0) :], *measured[:keep_best]]
    return [x for x in found if x not in kept]
