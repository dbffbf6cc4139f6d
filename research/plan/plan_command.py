"""Carries out `python -m research.plan` once its flags are read."""

import dataclasses
import logging
import sys

from rich.console import Console

from research.config.run_config import Config
from research.parallel import runtime
from research.plan import abstract_step, plan_json, planner
from research.plan.compiled import compile_step
from research.plan.layout_search import search
from research.plan.planned_devices import PlannedDevices, parse_device, parse_topology
from research.plan.planner import Plan
from research.report import plan_tables


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """The flags of `research/plan/__main__.py` and the config to plan."""

    config: Config
    topology: str
    slices: int
    device: str
    search: bool
    json: str
    preset: str


def run(request: PlanRequest) -> int:
    """Plans and shows; returns 0 if it fits, 1 if not.

    Raises:
      UserError: the user must change a flag or the config.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("jax").setLevel(logging.ERROR)
    config, console = request.config, Console()
    target = _target(request)
    if request.json:
        plan_json.check_json(request.json)
    architecture = abstract_step.find_architecture(config, request.preset)
    devices = [] if request.device else compile_step.topology_devices(target)

    def plan(config: Config) -> Plan:
        if devices:
            return planner.plan_compiled(config, architecture, target, devices)
        return planner.plan_estimate(config, architecture, target)

    if request.search:
        # Otherwise every candidate logs which attention kernel it takes.
        logging.getLogger().setLevel(logging.WARNING)
        found = search(config, architecture, target, plan if devices else None)
        plans = [plan_json.to_json(plan) for plan in found.plans]
        plan_tables.show_search(console, plans, found.refused)
    else:
        plans = [plan_json.to_json(plan(config))]
        plan_tables.show_plan(console, plans[0])
    if request.json:
        plan_json.write_json(request.json, plans if request.search else plans[0])
    return 0 if plans[0]["fits"] else 1


def _target(request: PlanRequest) -> PlannedDevices:
    if not request.device:
        return parse_topology(request.topology, request.slices)
    is_cpu = request.device.partition(":")[0] == "cpu"
    config = request.config
    flops = runtime.peak_flops(config.runtime, config.model.dtype) if is_cpu else 0.0
    return parse_device(request.device, request.slices, flops or 0.0)
