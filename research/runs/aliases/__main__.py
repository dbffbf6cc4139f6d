"""Moves an alias: `python -m research.runs.aliases --alias=runs/prod --run=RUN@300`."""

import dataclasses
import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError
from research.core.local_paths import local_path, split_step

USAGE = """
python -m research.runs.aliases --alias=runs/prod [--run=RUN[@STEP] | --back]

Lets the alias stand for a checkpoint of a run, or again for what it stood for before;
without either, prints what it has stood for. `research.serve --run=runs/prod` serves
it, and a server that runs follows it within 10 seconds.
"""


@dataclasses.dataclass(frozen=True)
class AliasFlags:
    """The flags of `python -m research.runs.aliases`."""

    alias: str = knob("", "folder of the alias, beside the runs", is_path=True)
    run: str = knob("", "run directory, or RUN@STEP, to promote", is_path=True)
    back: bool = knob(False, "return to the checkpoint before")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, AliasFlags)
    if not f.alias or (f.run and f.back):
        raise UserError(
            "give --alias=FOLDER, such as runs/prod, and --run=RUN@STEP or --back"
        )
    from research.runs.aliases import promotions, run_alias

    alias, who = local_path(f.alias, "--alias"), getpass.getuser()
    if f.run:
        place, step = split_step(f.run)
        promotions.promote(
            alias, Path(local_path(place, "--run")), step or "latest", who
        )
    elif f.back:
        promotions.back(alias, who)
    for each in run_alias.history(alias):
        sys.stdout.write(f"{each.at}  {each.run}@{each.step}  {each.by}\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)
