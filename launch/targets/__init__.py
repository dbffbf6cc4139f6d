"""Where training can be started: one file per target, found by its name.

A target is a module with the parts of `Target`. To add one, add a file here and a row
to docs/launch.md.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Protocol

from launch.jobs.launch_job import LaunchJob, LaunchPlan
from research.config.run_config import Config


class Target(Protocol):
    """The parts of a target's file.

    Attributes:
      HELP: one line for `--help`.
      TOOLS: the programs that it calls, each with how to install it.
    """

    HELP: str
    TOOLS: Mapping[str, str]

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Adds the flags that only this target has."""
        ...

    def rents(self, options: argparse.Namespace) -> bool:
        """Whether these options rent chips, so that the config must fit them."""
        ...

    def chips(
        self, options: argparse.Namespace, config: Config
    ) -> tuple[str, int] | None:
        """The chips of a job, as `("v5e:4x4", slices)`; None if not known."""
        ...

    def plan(
        self, jobs: Sequence[LaunchJob], options: argparse.Namespace
    ) -> LaunchPlan:
        """Turns jobs into files and commands, and does nothing else.

        Raises:
          UserError: an option or a config does not fit this target.
        """
        ...

    def run(self, plan: LaunchPlan, options: argparse.Namespace) -> int:
        """Carries the plan out; returns the exit code."""
        ...


def names() -> list[str]:
    """The names of all targets, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found)


def find(name: str) -> Target:
    """The target of that name, which must be one of `names()`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
