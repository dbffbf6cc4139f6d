"""Starts a training run somewhere: `python -m launch TARGET -- --config=...`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from launch import gate, settings, targets
from launch.job import Job, check_training_flags
from research import doors
from research.errors import UserError

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
        sys.stdout.write(settings.table())
        return 0
    options = make_parser().parse_args(own)
    config = check_training_flags(training)
    target = targets.find(options.target)
    rented = gate.chips(target, config, options)
    chip = rented[0].partition(":")[0] if rented else ""
    env = settings.environment(chip, options.settings.split(","))
    job = dataclasses.replace(Job.of_run(training, config), env=env)
    plan = target.plan([job], options)
    if not options.dry_run:
        plan.require_tools(target.TOOLS)
    # The slowest check comes last, and before anything is written or run.
    if found := gate.check(target, rented, config, options):
        sys.stderr.write(f"launch: {found}\n")
    if options.dry_run:
        sys.stdout.write(plan.text())
        return 0
    return target.run(plan, options)


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


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are ours: one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see python -m launch --help")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
        own.add_argument(
            "--dry-run", action="store_true", help="show, and do nothing else"
        )
        own.add_argument(
            "--settings",
            default="default",
            help="default, none, or names of --settings=list, with commas between",
        )
        gate.add_flags(own)
        target.add_flags(own)
    return parser


if __name__ == "__main__":
    doors.run(main)
