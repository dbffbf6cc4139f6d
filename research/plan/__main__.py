"""Plans a run before chips are rented: `python -m research.plan --config=FILE.py`."""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from research.config import command_line
from research.config.knobs import knob
from research.config.run_config import Config
from research.core.errors import UserError
from research.plan.compiled.libtpu_environment import ENVIRONMENT
from research.plan.planned_devices import (
    HERE,
    PlannedDevices,
    local_device,
    parse_device,
    parse_topology,
)

if TYPE_CHECKING:
    from research.models.architecture import Architecture

USAGE = """
python -m research.plan --config=FILE.py [--config.KNOB=VALUE ...]
    [--topology=v5e:4x4] [--slices=2] | [--device=h100:8]

Compiles the real train step for TPUs, even without one in this machine (pip install
libtpu, in an environment of its own) and shows the memory of a chip, the traffic
between chips, the best possible speed and the cost. --device estimates the same by
formula, for any chip, without a compiler: 4090, a100-40x8, v5e:4x4, or 24GB for a card
of which only the memory is known; here means the chips of this machine. Several between
commas are planned one after the other. A config that does not fit gets the flags with
which it does. Neither weights nor data are read. Topologies count chips. The cloud's
name v5p-512 counts cores; it is --topology=v5p:4x8x8.
"""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    topology: str = knob("", "TPU slice; empty: config.runtime.topology")
    slices: int = knob(0, "number of slices; 0: config.runtime.slices", low=0)
    device: str = knob(
        "", "estimate only, for 4090, h100:8, v5e:4x4, 24GB, cpu or here; or several"
    )
    search: bool = knob(False, "find the largest micro-batch, layouts and remat")
    json: str = knob("", "file to write the plan into", is_path=True)
    preset: str = knob("", "shape that stands for the config's model")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 fits, 1 does not."""
    config, f = command_line.parse_with_config(argv, USAGE, PlanFlags)
    if f.topology and f.device:
        raise UserError(
            "--topology and --device are both set; set the one that names your chips"
        )
    if not (f.topology or config.runtime.topology or f.device):
        raise UserError(
            "no chips are named: give --topology=v5e:4x4, --device=h100:8 or "
            "--device=cpu, or set config.runtime.topology"
        )
    if f.search and "," in f.device:
        raise UserError("--search compares layouts on one kind of chips: name one")
    os.environ |= ENVIRONMENT
    return plan(config, f)


def plan(config: Config, f: PlanFlags) -> int:
    """Plans and shows; returns the exit code."""
    # JAX starts with these imports, and reads the environment.
    from rich.console import Console

    from research.plan import abstract_step, plan_json
    from research.report import plan_tables

    logging.basicConfig(
        level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("jax").setLevel(logging.ERROR)
    console, names = Console(), f.device.split(",")
    if f.json:
        plan_json.check_json(f.json)
    architecture = abstract_step.find_architecture(config, f.preset)
    if len(names) > 1:
        plans = []
        for name in names:
            one = dataclasses.replace(f, device=name.strip())
            try:
                plans += make_plans(config, one, architecture)[0]
            except UserError as error:
                plans.append({"target": one.device, "problem": str(error)})
        plan_tables.show_devices(console, plans)
    else:
        plans, refused = make_plans(config, f, architecture)
        if f.search:
            plan_tables.show_search(console, plans, refused)
        else:
            plan_tables.show_plan(console, plans[0])
    several = f.search or len(names) > 1
    if f.json:
        plan_json.write_json(f.json, plans if several else plans[0])
    return 0 if any(x.get("fits") for x in plans) else 1


def make_plans(
    config: Config, f: PlanFlags, architecture: "Architecture"
) -> tuple[list[dict[str, Any]], int]:
    """The plan for one kind of chips, or those of a search and how many it refused."""
    from research.plan import fit_advice, layout_search, plan_json, planner
    from research.plan.compiled import compile_step

    target = find_target(config, f)
    devices = [] if f.device else compile_step.topology_devices(target)

    def plan_one(config: Config) -> planner.Plan:
        if devices:
            return planner.plan_compiled(config, architecture, target, devices)
        return planner.plan_estimate(config, architecture, target)

    def shown(plan: planner.Plan) -> dict[str, Any]:
        if plan.fits:
            flags = fit_advice.flags_between(config, plan.config)
            return plan_json.to_json(plan, flags)
        advice = fit_advice.advise(plan, architecture, config)
        return plan_json.to_json(plan, advice.words)

    if f.search:
        # Otherwise every candidate logs which attention kernel it takes.
        logging.getLogger().setLevel(logging.WARNING)
        compile_plan = plan_one if devices else None
        found = layout_search.search(config, architecture, target, compile_plan)
        return [shown(plan) for plan in found.plans], found.refused
    plan = plan_one(config)
    logging.getLogger().setLevel(logging.WARNING)
    return [shown(plan)], 0


def find_target(config: Config, f: PlanFlags) -> PlannedDevices:
    """The chips that the flags, or else the config, name."""
    from research.parallel import runtime

    slices = f.slices or config.runtime.slices
    if not f.device:
        return parse_topology(f.topology or config.runtime.topology, slices)
    flops, device = 0.0, local_device() if f.device == HERE else f.device
    if device.partition(":")[0] == "cpu":
        known = runtime.peak_flops(config.runtime)
        flops = known or runtime.measure_matmul_flops(config.model.dtype)
    return parse_device(device, slices, flops)


if __name__ == "__main__":
    command_line.run(main)
