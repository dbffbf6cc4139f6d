"""What is checked before money is spent: that the config fits the chips asked for.

The planner's formula answers in a second, from the shape of the model alone; see
`research/planning/`. What it cannot know it refuses, and says how to go on.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.targets import Target
from research.config.run_config import Config
from research.core.errors import UserError
from research.parallel.chips import GIB
from research.plan.compiled.libtpu_environment import ENVIRONMENT

if TYPE_CHECKING:
    # JAX comes with it, and a mistyped flag is answered without JAX.
    from research.plan.planner import Plan

OVERRIDE = "--no-fit-check"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of every target."""
    parser.add_argument(
        OVERRIDE, action="store_true", help="launch what may not fit into the memory"
    )
    parser.add_argument(
        "--preset",
        default="",
        help="shape that stands for the config's model where that is out of reach",
    )


def chips(
    target: Target, config: Config, options: argparse.Namespace
) -> tuple[str, int] | None:
    """What the target rents, as `("v5e:4x4", slices)`; None where it does not know."""
    ask = getattr(target, "chips", None)
    return ask(options, config) if ask else None


def check(
    target: Target,
    rented: tuple[str, int] | None,
    configs: Sequence[Config],
    options: argparse.Namespace,
) -> list[str]:
    """What was found, a line each; nothing for a target that rents nothing.

    Raises:
      UserError: a config does not fit, or nobody can know.
    """
    rents = getattr(target, "rents", lambda options: True)
    if options.no_fit_check or not hasattr(target, "chips") or not rents(options):
        return []
    if rented is None:
        return ["whether it fits is not checked: the target names no chips"]
    # Of runs that differ only in these one stands for all.
    same = {repr(dataclasses.replace(c, run_dir="", seed=0)): c for c in configs}
    found = [
        require_fit(config, *rented, preset=options.preset) for config in same.values()
    ]
    return list(dict.fromkeys(found))


def require_fit(config: Config, device: str, slices: int = 1, preset: str = "") -> str:
    """Plans `config` by formula; one line that says what a chip would hold.

    Args:
      config: what is to be launched.
      device: the chips, as `v5e:4x4` or `h100:16`.
      slices: of TPUs.
      preset: a shape that stands for the config's model.

    Raises:
      UserError: it does not fit, cannot be split over the chips, or its shape is out
        of reach.
    """
    with _planning():
        from research.plan import abstract_step, planned_devices, planner

        chips = planned_devices.parse_device(device, slices)
        try:
            architecture = abstract_step.find_architecture(config, preset)
        except UserError as error:
            raise UserError(
                f"whether the config fits {chips.name} cannot be known: {error}, and "
                f"{OVERRIDE} goes on without"
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
        f"launch it as it is with {OVERRIDE}"
    )


@contextlib.contextmanager
def _planning() -> Iterator[None]:
    """JAX without accelerators, in here alone.

    What the planner sets, and what JAX sets at its import, would go on to the run:
    a trainer on this machine, or a job to which sbatch gives the whole environment.
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
    assert memory is not None, "an estimate always has one"
    parts = {
        "frozen weights": memory.frozen,
        "trained weights": memory.trained,
        "optimizer state": memory.optimizer,
        "activations and gradients": memory.temporaries,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{parts[name] / GIB:.1f} of them {name}"


def _remedy(plan: "Plan", replan: Callable[[Config], "Plan"]) -> str:
    """The knobs that make it fit, as flags; tried in turn until it does."""
    flags: list[str] = []
    for change in (_spread, _shrink_pass, _recompute, _offload):
        if not (knobs := change(plan)):
            continue
        try:
            changed = replan(_with(plan.config, knobs))
        except UserError:
            continue  # What cannot be split so is no remedy.
        if changed.needed < plan.needed:
            plan = changed
            flags += [f"--config.{knob}={value}" for knob, value in knobs.items()]
        if plan.fits:
            return f"it fits with {' '.join(flags)}"
    if not flags:
        return "take more chips"
    still = f"{plan.needed / GIB:.1f} GiB"
    return f"take more chips; with {' '.join(flags)} it needs {still}"


def _spread(plan: "Plan") -> dict[str, Any]:
    """The weights over every chip of a slice."""
    mesh = plan.mesh
    kept = mesh.get("tensor", 1) * mesh.get("context", 1) * plan.target.slices
    widest = plan.target.count // kept
    if mesh.get("fsdp", 1) == widest:
        return {}
    return {
        "mesh.replica": plan.target.slices, "mesh.data": 1, "mesh.fsdp": widest
    }  # fmt: skip


def _shrink_pass(plan: "Plan") -> dict[str, Any]:
    """The fewest rows at a time."""
    mesh = plan.mesh
    fewest = mesh.get("replica", 1) * mesh.get("data", 1) * mesh.get("fsdp", 1)
    return {"data.microbatch_size": fewest} if plan.micro_rows > fewest else {}


def _recompute(plan: "Plan") -> dict[str, Any]:
    return {"model.remat": "full"} if plan.config.model.remat != "full" else {}


def _offload(plan: "Plan") -> dict[str, Any]:
    there = plan.config.runtime.offload_optimizer
    return {} if there else {"runtime.offload_optimizer": True}


def _with(config: Config, knobs: Mapping[str, Any]) -> Config:
    for path, value in knobs.items():
        group, _, name = path.partition(".")
        inner = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: inner})
    return config
