"""What every launch does between reading its flags and running its commands."""

import argparse
import sys
from collections.abc import Sequence

from launch.job import Job
from launch.targets import Target
from research.errors import UserError


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are ours: one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def add_flags(parser: argparse.ArgumentParser, target: Target) -> None:
    """Those that every target has, and its own."""
    parser.add_argument(
        "--dry-run", action="store_true", help="show, and do nothing else"
    )
    target.add_flags(parser)


def start(target: Target, jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Runs the jobs, or shows what that would take; returns the exit code.

    Raises:
      UserError: a flag or the config does not fit the target, or a tool is missing.
    """
    plan = target.plan(jobs, options)
    if options.dry_run:
        sys.stdout.write(plan.text())
        return 0
    plan.require_tools(target.TOOLS)
    return target.run(plan, options)
