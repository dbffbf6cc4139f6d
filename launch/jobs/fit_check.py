"""Checks that a config fits the chips before any money is spent.

The planner's formula (`research/plan`) answers within a second from the shape of the
model. A launch whose fit cannot be computed is refused, with the flag to override it.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from launch.jobs.launch_flags import add_switch, add_text
from launch.targets import Target
from research.config.run_config import Config
from research.core.errors import UserError
from research.parallel.chips import GIB
from research.plan.compiled.libtpu_environment import ENVIRONMENT

OVERRIDE = "--no-fit-check"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this check."""
    add_switch(parser, OVERRIDE, "launch even if the config may not fit")
    add_text(
        parser, "--preset", "shape to use if the config's model cannot be read here"
    )


def check(
    target: Target, configs: Sequence[Config], options: argparse.Namespace
) -> list[str]:
    """Checks all configs; returns lines to show, none if nothing is rented.

    Raises:
      UserError: a config does not fit, or nobody can know whether it does.
    """
    if options.no_fit_check or not target.rents(options):
        return []
    rented = target.chips(options, configs[0])
    if rented is None:
        named = "; add --device=h100, or your kind" if "device" in options else ""
        return [f"the fit was not checked: no flag names the chips{named}"]
    # Runs that differ only in seed and folder need the same memory.
    same = {repr(dataclasses.replace(c, run_dir="", seed=0)): c for c in configs}
    found = [
        require_fit(config, *rented, preset=options.preset) for config in same.values()
    ]
    return list(dict.fromkeys(found))


def require_fit(config: Config, device: str, slices: int = 1, preset: str = "") -> str:
    """Plans `config` by formula and returns a line that says how full a chip is.

    `device` is the chips, as `v5e:4x4` or `h100:16`; `preset` is a shape to use in
    place of the config's model.

    Raises:
      UserError: the config does not fit or cannot be split over the chips, or the
        shape of its model cannot be read.
    """
    with _planning():
        from research.plan import (
            abstract_step,
            fit_advice,
            planned_devices,
            planner,
        )

        chips = planned_devices.parse_device(device, slices)
        try:
            architecture = abstract_step.find_architecture(config, preset)
        except UserError as error:
            raise UserError(
                f"whether the config fits {chips.name} cannot be known: {error}; "
                f"{OVERRIDE} launches it without this check; write either before --"
            ) from error
        try:
            plan = planner.plan_estimate(config, architecture, chips)
        except UserError as error:
            raise UserError(f"on {chips.name}: {error}") from error
        held = (
            f"{plan.needed / GIB:.1f} GiB of {plan.limit / GIB:.1f} GiB usable per "
            f"chip on {chips.name}"
        )
        if plan.fits:
            return f"fits: {held}, estimated"
        advice = fit_advice.advise(plan, architecture, config).words
    raise UserError(
        f"the config needs {held} (estimated; {plan.largest_part}): {advice}; "
        f"{OVERRIDE} before -- launches it anyway"
    )


@contextlib.contextmanager
def _planning() -> Iterator[None]:
    """Hides accelerators from JAX, and restores the environment afterwards.

    The variables that the planner and JAX set must not reach the run: a local trainer
    and a Slurm job both inherit this environment.
    """
    before = dict(os.environ)
    os.environ |= ENVIRONMENT
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
