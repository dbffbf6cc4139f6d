"""Starts a training run on a target: `python -m launch TARGET -- --config=...`."""

import argparse
import sys
from collections.abc import Sequence

from launch import targets
from launch.jobs import compiler_settings, launcher
from launch.jobs.launch_flags import LaunchParser
from launch.jobs.launch_job import LaunchJob, check_training_flags
from research.config import command_line
from research.core.errors import UserError

USAGE = """
The flags after -- go to research.train unchanged. --dry-run shows the files and the
commands of a launch and does nothing else. `TARGET --help` lists the target's flags.
--settings=list shows all compiler and library settings with their chips.
"""
LIST = "--settings=list"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    own, training = split(argv[1:])
    if LIST in own:
        sys.stdout.write(compiler_settings.table())
        return 0
    options = make_parser().parse_args(own)
    config = check_training_flags(training)
    target = targets.find(options.target)
    return launcher.start(target, [LaunchJob.of_run(training, config)], options)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits at the first `--` into the launcher's flags and the trainer's flags.

    Raises:
      UserError: there is no `--`, and no flag that only shows something.
    """
    own = list(arguments)
    if "--" in own:
        middle = own.index("--")
        return own[:middle], own[middle + 1 :]
    if not own or {"-h", "--help", LIST} & set(own):
        return own or ["--help"], []
    raise UserError("nothing to train: add -- --config=FILE.py after the target")


def make_parser() -> argparse.ArgumentParser:
    parser = LaunchParser(
        prog="python -m launch",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for name in targets.names():
        target = targets.find(name)
        own = known.add_parser(
            name, help=target.HELP, description=target.HELP, allow_abbrev=False
        )
        launcher.add_flags(own, target)
    return parser


if __name__ == "__main__":
    command_line.run(main)
