"""Shows and checks a run's checkpoints: `python -m research.checkpoints --run=...`."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import DamagedError, UserError
from research.core.local_paths import local_path
from research.core.visible_text import counted, visible

if TYPE_CHECKING:
    from research.checkpoints.checkpoint_listing import Checkpoint
    from research.runs.run_directory import RunDir

USAGE = """
python -m research.checkpoints --run=RUN_DIR [list | verify | export-step | prune]

list (the default) shows step, size, time, held-out loss and a fingerprint of the data
that it was measured on, and checks every byte.
verify lists damaged files and exits with code 5 if there are any. export-step writes
--step as a Hugging Face folder --out. prune removes damaged checkpoints, and all intact
ones but the newest --keep_last, the best --keep_best, and those that other runs are
built on.
"""


@dataclasses.dataclass(frozen=True)
class CheckpointsFlags:
    """The flags of `python -m research.checkpoints`."""

    verb: str = knob(
        "list",
        "what to do",
        choices=("list", "verify", "export-step", "prune"),
    )
    run: str = knob("", "run directory, its config.json or config file", is_path=True)
    step: str = knob("latest", "for export-step: latest, best, or a step number")
    out: str = knob("", "for export-step: folder to write", is_path=True)
    replace: bool = knob(False, "for export-step: replace another step in the folder")
    keep_last: int = knob(1, "for prune: newest checkpoints that stay", low=1)
    keep_best: int = knob(
        1, "for prune: checkpoints that stay for their held-out loss", low=0
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, CheckpointsFlags)
    if not f.run:
        raise UserError("--run=RUN_DIR is missing, e.g. runs/finetune_dolly")
    from research.checkpoints.checkpoint_listing import inspect
    from research.runs.run_directory import RunDir

    folder = RunDir(f.run)
    config = folder.config()  # Refuses a folder that is not a run directory.
    if f.verb == "export-step":
        if not f.out:
            raise UserError("--out=FOLDER is missing: the folder to write")
        from research.export.write_model import write_model
        from research.parallel import runtime

        runtime.start_alone()
        write_model(f.run, f.step, local_path(f.out), "", f.replace)
        return 0
    if f.verb == "prune":
        folder.lock()  # A running trainer counts and removes its checkpoints itself.
    by, run = config.checkpoint.best_by, folder.origin().get("run", "")
    found = inspect(folder.checkpoints, run, by)
    if f.verb == "prune":
        return _prune(folder, found, f.keep_last, f.keep_best)
    _show(folder, found)
    return _verify(found) if f.verb == "verify" else 0


def _show(folder: "RunDir", found: "list[Checkpoint]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A path may hold what Rich takes for markup.
    count = counted(len(found), "checkpoint")
    table = Table(title=Text(f"{visible(str(folder))}: {count}"))
    for name in ("step", "MB", "saved", "held-out loss", "on data", "files"):
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(
            str(each.step),
            f"{each.size / 1e6:,.1f}",
            f"{each.saved:%Y-%m-%d %H:%M:%S}",
            "-" if each.loss is None else f"{each.loss:.4f}",
            "-" if each.loss is None else each.data[:12],
            "damaged" if each.damage else "verified",
        )
    Console().print(table)


def _verify(found: "list[Checkpoint]") -> int:
    damaged = [x for x in found if x.damage]
    for each in damaged:
        for line in each.damage:
            sys.stdout.write(f"step {each.step}: {line}\n")
    if damaged:
        raise DamagedError(
            f"damaged: {len(damaged)} of {counted(len(found), 'checkpoint')}; training "
            "sets them aside and uses the newest that is whole, prune removes them"
        )
    sys.stdout.write(f"all whole: {counted(len(found), 'checkpoint')}\n")
    return 0


def _prune(
    folder: "RunDir", found: "list[Checkpoint]", keep_last: int, keep_best: int
) -> int:
    from research.checkpoints.checkpoint_listing import superfluous
    from research.checkpoints.needed_steps import needed_steps

    if found and all(x.damage for x in found):
        raise DamagedError(
            "every checkpoint is damaged: prune would leave none, so it removes none"
        )
    needed = needed_steps(folder.path)
    gone = superfluous(found, keep_last, keep_best, needed)
    for each in {x.step for x in found if not x.damage} & needed.keys():
        sys.stdout.write(f"step {each} stays: {visible(needed[each])} is built on it\n")
    for each in gone:
        shutil.rmtree(each.folder)
        sys.stdout.write(f"removed step {each.step}, {each.size / 1e6:,.1f} MB\n")
    sys.stdout.write(f"{len(found) - len(gone)} kept\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)
