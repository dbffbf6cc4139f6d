"""One file a target: `HELP`, `TOOLS`, `add_flags`, `plan` and `run`.

A target turns jobs into a `LaunchPlan`; `run` carries it out. To add one, add a file.

One that rents machines also has `chips(options, config)`: what they are, as
`("v5e:4x4", slices)`, or None where it does not know. The gate asks the planner.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Protocol

from launch.jobs.launch_job import LaunchJob, LaunchPlan


class Target(Protocol):
    """What a file here offers.

    Attributes:
      HELP: one line.
      TOOLS: programs it calls, and for each what to install.
    """

    HELP: str
    TOOLS: Mapping[str, str]

    def add_flags(self, parser: argparse.ArgumentParser) -> None: ...

    def plan(
        self, jobs: Sequence[LaunchJob], options: argparse.Namespace
    ) -> LaunchPlan: ...

    def run(self, plan: LaunchPlan, options: argparse.Namespace) -> int: ...


def names() -> list[str]:
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found)


def find(name: str) -> Target:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
