"""Starts a training run on a target: `python -m launch TARGET -- --config=...`."""

import sys
from collections.abc import Sequence

from launch import targets
from launch.jobs import compiler_settings, launcher
from launch.jobs.launch_flags import LaunchParser, split_flags
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
    own, training = split_flags(argv[1:])
    if LIST in own:
        sys.stdout.write(compiler_settings.FILE.read_text(encoding="utf-8"))
        return 0
    options = make_parser().parse_args(own or ["--help"], training=training)
    if "--" not in argv:
        raise UserError("nothing to train: add -- --config=FILE.py after the target")
    config = check_training_flags(training)
    target = targets.find(options.target)
    return launcher.start(target, [LaunchJob.of_run(training, config)], options)


def make_parser() -> LaunchParser:
    parser = LaunchParser(prog="python -m launch", description=USAGE)
    known = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for name in targets.names():
        target = targets.find(name)
        own = known.add_parser(name, help=target.HELP, description=target.HELP)
        launcher.add_flags(own, target)
    return parser


if __name__ == "__main__":
    command_line.run(main)
