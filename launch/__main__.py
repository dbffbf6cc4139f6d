"""Starts a training run somewhere: `python -m launch TARGET -- --config=...`."""

import argparse
import sys
from collections.abc import Sequence

from launch import targets
from launch.jobs import compiler_settings, launcher
from launch.jobs.launch_job import LaunchJob, check_training_flags
from research.config import command_line
from research.core.errors import UserError

USAGE = """
What stands after -- goes to research.train as it is. --dry-run shows the commands and
the files a target would use, and does nothing else. `TARGET --help` has its own flags.
--settings=list shows what compilers and libraries can be told, chip by chip.
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
    """The launcher's own flags, and those of the trainer, after the first `--`.

    Raises:
      UserError: there is no `--`, and no help is asked for.
    """
    own = list(arguments)
    if "--" in own:
        middle = own.index("--")
        return own[:middle], own[middle + 1 :]
    if not own or {"-h", "--help", LIST} & set(own):
        return own or ["--help"], []
    raise UserError("nothing to train: put -- --config=FILE.py after the target")


def make_parser() -> argparse.ArgumentParser:
    parser = launcher.Parser(
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
