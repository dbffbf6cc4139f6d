"""Reports the results of a sweep: `python -m launch.report --sweep=...`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.launch_flags import LaunchParser, add_path
from research.config import command_line
from research.core.errors import UserError
from research.core.local_paths import local_path

USAGE = """
Writes report.html, report.md and report.json into the folder of a sweep, from the files
of its runs so far, and shows report.md. It names the runs that are not done.
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = LaunchParser("--sweep", prog="python -m launch.report", description=USAGE)
    add_path(parser, "--sweep", "the sweep's file, or the folder of its runs")
    add_path(parser, "--folder", "folder of the runs; default: runs/sweeps/NAME")
    options = parser.parse_args(argv[1:])
    if not options.sweep:
        parser.error("--sweep=FILE.py is missing")
    folder = find(options.sweep, options.folder)
    # Imported here: a mistyped flag must not wait for Matplotlib.
    from launch.report import sweep_page

    written = sweep_page.write(folder)
    sys.stdout.write(written[-1].read_text(encoding="utf-8").partition("\n![")[0])
    sys.stdout.write(f"\n{' '.join(map(str, written))}\n")
    return 0


def find(sweep: str, folder: str) -> Path:
    """Finds the folder with `sweep.json`.

    Raises:
      UserError: there is none.
    """
    given = local_path(sweep)
    place = local_path(folder) if folder else given
    if given.suffix == ".py" and not folder:
        place = Path("runs/sweeps") / given.stem
    if not os.path.lexists(place / "sweep.json"):
        raise UserError(
            f"--sweep={sweep}: {place} has no sweep.json; run python -m launch.sweep "
            "first, or name the folder of its runs with --folder=DIR"
        )
    return place


if __name__ == "__main__":
    command_line.run(main)
