"""The steps of every launch between reading its flags and running its commands."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from launch.jobs import compiler_settings, fit_check
from launch.jobs.launch_flags import add_switch, add_text
from launch.jobs.launch_job import LaunchJob
from launch.targets import Target


def add_flags(parser: argparse.ArgumentParser, target: Target) -> None:
    """Adds the flags that every target has, and the target's own."""
    add_switch(parser, "--dry-run", "show files and commands; do nothing")
    meaning = "default, none, or names of --settings=list, separated by commas"
    add_text(parser, "--settings", meaning, default="default")
    fit_check.add_flags(parser)
    target.add_flags(parser)


def with_settings(
    target: Target, jobs: Sequence[LaunchJob], options: argparse.Namespace
) -> list[LaunchJob]:
    """Returns the jobs with the variables that `--settings` sets on these chips.

    Raises:
      UserError: one of the names is no setting, or it is not for these chips.
    """
    if not jobs:
        return []
    rented = target.chips(options, jobs[0].config)
    chip = rented[0].partition(":")[0] if rented else ""
    env = compiler_settings.environment(chip, options.settings.split(","))
    return [dataclasses.replace(job, env=env) for job in jobs]


def start(
    target: Target, jobs: Sequence[LaunchJob], options: argparse.Namespace
) -> int:
    """Runs the jobs, or shows them if `--dry-run` is set; returns the exit code.

    Raises:
      UserError: a flag or the config does not fit the target, or a tool is missing.
    """
    jobs = with_settings(target, jobs, options)
    plan = target.plan(jobs, options)
    if not options.dry_run:
        plan.require_tools(target.TOOLS)
    # The slowest check comes last, but before anything is written or run.
    fit = fit_check.check(target, [job.config for job in jobs], options)
    for line in (*fit, *plan.notes):
        sys.stderr.write(f"launch: {line}\n")
    if options.dry_run:
        sys.stdout.write(plan.text())
        return 0
    return target.run(plan, options)
