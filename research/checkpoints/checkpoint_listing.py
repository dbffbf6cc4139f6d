"""The checkpoints of a run: size, loss, damage, and which ones can be removed."""

import dataclasses
import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.checkpoints.checksums import find_damage, saving_run
from research.checkpoints.stored_steps import size_of, step_folders
from research.core.errors import UserError

METRICS = "metrics"  # Orbax's own name for the item.
LOSS = "loss"  # The value of `checkpoint.best_by` that is no metric of answers.


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
      cost: the value that ranks it by `checkpoint.best_by`, the lower the better.
    """

    step: int
    folder: Path
    size: int
    saved: datetime.datetime
    loss: float | None
    data: str
    damage: tuple[str, ...]
    cost: float | None = None


def inspect(folder: Path, run: str = "", best_by: str = LOSS) -> list[Checkpoint]:
    """Lists all checkpoints in `folder`, oldest first, and reads every byte of them.

    Those that another run than `run` has saved count as damaged. `best_by` ranks them.

    Raises:
      UserError: see `refuse_other_identity`.
    """
    refuse_other_identity(folder, run)
    return [_inspect_one(path, run, best_by) for path in step_folders(folder)]


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


def _inspect_one(folder: Path, run: str, best_by: str) -> Checkpoint:
    damage = tuple(find_damage(folder, run=run))
    metrics, loss, data, cost = folder / METRICS / METRICS, None, "", None
    if not damage:
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        data = meta["identity"].get("data", "")
        if metrics.is_file():
            found = json.loads(metrics.read_bytes())
            loss = found["loss"]
            cost = comparable_cost(found, found.get("data", ""), best_by)
            cost = cost if math.isfinite(cost) else None
    saved = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
    size = size_of(folder)
    step = int(folder.name)
    return Checkpoint(step, folder, size, saved, loss, data, damage, cost)


def measured_costs(
    folder: Path, data: str, run: str, best_by: str = LOSS
) -> dict[int, float]:
    """The values by step that `best_by` ranks, intact, finite and of the data `data`.

    Those that another run than `run` has saved do not count.
    """
    found = {}
    for step in step_folders(folder):
        file = step / METRICS / METRICS
        if not find_damage(step, item=METRICS, run=run) and file.is_file():
            cost = comparable_cost(json.loads(file.read_bytes()), data, best_by)
            if math.isfinite(cost):
                found[int(step.name)] = cost
    return found


def choose_step(
    folder: Path, step: str, data: str, run: str, best_by: str = LOSS
) -> int:
    """The number of the checkpoint `step`: latest, best, or a number.

    Raises:
      UserError: there is no such checkpoint; the message lists those that are there.
    """
    known = [int(path.name) for path in step_folders(folder)]
    number = max(known, default=None)
    if step == "best":
        costs = measured_costs(folder, data, run, best_by)
        number = min(costs, key=costs.__getitem__, default=None)
    elif step != "latest":
        number = int(step) if step.isdecimal() else None
    if number is None or number not in known:
        measured = "held-out loss" if best_by == LOSS else best_by
        why = f", as no {measured} was measured at one" if step == "best" else ""
        raise UserError(
            f"{folder.parent} has no checkpoint {step!r}{why}; it has steps "
            f"{', '.join(map(str, known)) or 'none yet'}"
        )
    return number


def comparable_cost(metrics: Mapping[str, Any], data: str, best_by: str) -> float:
    """The value in a checkpoint's metrics that `best_by` ranks, the lower the better.

    Infinite if it was not measured, or not on `data`. Metrics that do not say which
    data it was are of an older version.
    """
    cost = None
    if metrics.get("data", data) == data:
        if best_by == LOSS:
            cost = metrics["loss"]
        elif metrics.get("best_by") == best_by:
            cost = metrics["cost"]
    return math.inf if cost is None else cost


def make_metrics(
    loss: float | None, cost: float | None, data: str, best_by: str
) -> tuple[dict[str, Any] | None, float]:
    """The metrics of a checkpoint, if any were measured, and their comparable cost.

    `cost` is that of the answers by `best_by`.
    """
    if loss is None and cost is None:
        return None, math.inf
    metrics = {"loss": loss, "data": data}
    if cost is not None:
        metrics |= {"best_by": best_by, "cost": cost}
    return metrics, comparable_cost(metrics, data, best_by)


def superfluous(
    found: Sequence[Checkpoint],
    keep_last: int,
    keep_best: int,
    needed: Collection[int] = (),
) -> list[Checkpoint]:
    """The checkpoints to remove: all but the newest `keep_last` and best `keep_best`.

    The steps `needed` stay, too.

    Damaged checkpoints do not count and are removed: they can never be restored. A
    cost is compared only with others on the data of the newest checkpoint.
    """
    whole = [x for x in found if not x.damage]
    same_data = [x for x in whole if x.data == whole[-1].data]
    measured = [x for x in same_data if x.cost is not None]
    measured.sort(key=lambda x: x.cost)
    kept = [*whole[max(len(whole) - keep_last, 0) :], *measured[:keep_best]]
    kept += [x for x in whole if x.step in needed]
    return [x for x in found if x not in kept]
