"""What checkpoints a run has: size, loss, whole or damaged, and which can go."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from research.checkpoints.checksums import find_damage
from research.checkpoints.disk_space import size_of


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One saved step.

    Attributes:
      step: optimizer updates it holds.
      folder: where it lies.
      size: bytes on disk.
      saved: when.
      loss: held-out loss of these very parameters, where it was measured.
      damage: what is wrong with its files; nothing if it is whole.
    """

    step: int
    folder: Path
    size: int
    saved: datetime.datetime
    loss: float | None
    damage: tuple[str, ...]


def inspect(folder: Path) -> list[Checkpoint]:
    """All checkpoints of a run, oldest first; every byte of them is read."""
    return [_inspect_one(path) for path in step_folders(folder)]


def step_folders(folder: Path) -> list[Path]:
    """The folders of committed steps, oldest first; none where there is no `folder`."""
    steps = [x for x in folder.glob("*") if x.name.isdecimal() and x.is_dir()]
    return sorted(steps, key=lambda x: int(x.name))


def _inspect_one(folder: Path) -> Checkpoint:
    damage = tuple(find_damage(folder))
    metrics, loss = folder / "metrics" / "metrics", None
    if metrics.is_file() and not damage:
        loss = json.loads(metrics.read_bytes())["loss"]
    saved = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
    return Checkpoint(int(folder.name), folder, size_of(folder), saved, loss, damage)


def superfluous(
    found: Sequence[Checkpoint], keep_last: int, keep_best: int
) -> list[Checkpoint]:
    """All but the newest `keep_last` and the best `keep_best` of those that are whole.

    Damaged ones go as well: they can never be restored.
    """
    whole = [x for x in found if not x.damage]
    measured = sorted((x for x in whole if x.loss is not None), key=lambda x: x.loss)
    kept = [*whole[max(len(whole) - keep_last, 0) :], *measured[:keep_best]]
    return [x for x in found if x not in kept]
