"""What every launch does between reading its flags and running its commands."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from launch.jobs import compiler_settings, fit_check
from launch.jobs.launch_job import LaunchJob
from launch.targets import Target
from research.core.errors import UserError


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are ours: one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def add_flags(parser: argparse.ArgumentParser, target: Target) -> None:
    """Those that every target has, and its own."""
    parser.add_argument(
        "--dry-run", action="store_true", help="show, and do nothing else"
    )
    parser.add_argument(
        "--settings",
        default="default",
        help="default, none, or names of --settings=list, with commas between",
    )
    fit_check.add_flags(parser)
    target.add_flags(parser)


def with_settings(
    target: Target, jobs: Sequence[LaunchJob], options: argparse.Namespace
) -> list[LaunchJob]:
    """The jobs with the variables that `--settings` comes to on the target's chips.

    Raises:
      UserError: one of the names is no setting, or is not for these chips.
    """
    if not jobs:
        return []
    rented = fit_check.chips(target, jobs[0].config, options)
    chip = rented[0].partition(":")[0] if rented else ""
    env = compiler_settings.environment(chip, options.settings.split(","))
    return [dataclasses.replace(job, env=env) for job in jobs]


def start(
    target: Target, jobs: Sequence[LaunchJob], options: argparse.Namespace
) -> int:
    """Runs the jobs, or shows what that would take; returns the exit code.

    Raises:
      UserError: a flag or the config does not fit the target, or a tool is missing.
    """
    rented = fit_check.chips(target, jobs[0].config, options)
    jobs = with_settings(target, jobs, options)
    plan = target.plan(jobs, options)
    if not options.dry_run:
        plan.require_tools(target.TOOLS)
    # The slowest check comes last, and before anything is written or run.
    for found in fit_check.check(target, rented, [job.config for job in jobs], options):
        sys.stderr.write(f"launch: {found}\n")
    if options.dry_run:
        sys.stdout.write(plan.text())
        return 0
    return target.run(plan, options)
