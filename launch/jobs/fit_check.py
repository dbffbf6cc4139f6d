"""Checks that a config fits the chips before any money is spent.

The planner's formula (`research/plan`) answers within a second from the shape of the
model. A launch whose fit cannot be computed is refused, with the flag to override it.
"""

import argparse
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launch.jobs.launch_flags import add_switch, add_text
from launch.targets import Target
from research.config.knobs import changed
from research.config.run_config import Config
from research.core.errors import UserError
from research.parallel.chips import GIB
from research.plan.compiled.libtpu_environment import ENVIRONMENT

if TYPE_CHECKING:
    # It imports JAX, which takes a second. A mistyped flag must not wait for that.
    from research.plan.planner import Plan

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
        return ["the fit was not checked: the target does not know its chips"]
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
        from research.plan import abstract_step, planned_devices, planner

        chips = planned_devices.parse_device(device, slices)
        try:
            architecture = abstract_step.find_architecture(config, preset)
        except UserError as error:
            raise UserError(
                f"whether the config fits {chips.name} cannot be known: {error}; "
                f"{OVERRIDE} launches it without this check"
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
        remedy = _remedy(plan, lambda c: planner.plan_estimate(c, architecture, chips))
    raise UserError(
        f"the config needs {held} (estimated; {_largest_part(plan)}): {remedy}, or "
        f"launch it anyway with {OVERRIDE}"
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


def _largest_part(plan: "Plan") -> str:
    memory = plan.memory
    assert memory is not None, "an estimate always has its memory"
    parts = {
        "frozen weights": memory.frozen,
        "trained weights": memory.trained,
        "optimizer state": memory.optimizer,
        "activations and gradients": memory.temporaries,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{parts[name] / GIB:.1f} GiB of it {name}"


def _remedy(plan: "Plan", replan: Callable[[Config], "Plan"]) -> str:
    """The flags that make it fit; one change after the other is tried."""
    flags: list[str] = []
    for change in REMEDIES:
        knobs = change(plan)
        try:
            smaller = replan(changed(plan.config, knobs, "a remedy"))
        except UserError:
            continue  # The config cannot be split in that way.
        if smaller.needed < plan.needed:
            plan = smaller
            flags += [f"--config.{knob}={value}" for knob, value in knobs.items()]
        if plan.fits:
            return f"it fits with {' '.join(flags)}"
    if not flags:
        return "take more chips"
    still = f"{plan.needed / GIB:.1f} GiB"
    return f"take more chips; with {' '.join(flags)} it needs {still}"


def _spread(plan: "Plan") -> dict[str, Any]:
    """Shards the weights over every chip of a slice."""
    mesh, slices = plan.mesh, plan.target.slices
    kept = mesh.get("tensor", 1) * mesh.get("context", 1) * slices
    widest = plan.target.count // kept
    return {"mesh.replica": slices, "mesh.data": 1, "mesh.fsdp": widest}


def _shrink_pass(plan: "Plan") -> dict[str, Any]:
    """Lowers the rows of a pass to the fewest possible."""
    split = (plan.mesh.get(axis, 1) for axis in ("replica", "data", "fsdp"))
    return {"data.microbatch_size": math.prod(split)}


REMEDIES: tuple[Callable[["Plan"], dict[str, Any]], ...] = (
    _spread,
    _shrink_pass,
    lambda plan: {"model.remat": "full"},
    lambda plan: {"runtime.offload_optimizer": True},
)
