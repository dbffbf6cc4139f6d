"""From a config and chips to a plan: does it fit, how fast can it be, what is sent."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from research.config.run_config import Config
from research.models.architecture import Architecture
from research.parallel import mesh as meshes
from research.plan import abstract_step
from research.plan.abstract_step import AbstractStep
from research.plan.compiled import compile_step
from research.plan.compiled.collectives import Collective, Traffic, summarize
from research.plan.compiled.compile_step import MemoryUse
from research.plan.estimate import memory_formulas, step_flops
from research.plan.estimate import roofline as rooflines
from research.plan.estimate.roofline import Prediction, Roofline
from research.plan.estimate.step_flops import StepFlops
from research.plan.planned_devices import PlannedDevices
from research.weights import parameter_paths

# Above this share of its memory a chip has too little left for what no plan sees:
# fragments, the batch that is on its way, evaluation.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a config on a target before any chip is rented.

    Attributes:
      target: the chips.
      config: what is planned.
      mesh: size of each axis above 1.
      source: `compiled`; `estimated`; or `refused` by the compiler for the memory that
        it needs, so that traffic is estimated.
      seconds: that compiling took.
      memory: by what it holds; None where the compiler only said it is too much.
      needed: bytes of a device.
      traffic: collectives of a step.
      flops: of a step over all devices.
      roofline: of a step.
      best: when all overlaps: no run is faster.
      worst: when nothing does, each part at its peak.
      trained: scalars that are trained.
      frozen: scalars that are not.
    """

    target: PlannedDevices
    config: Config
    mesh: dict[str, int]
    source: str
    seconds: float
    memory: MemoryUse | None
    needed: float
    traffic: list[Traffic]
    flops: StepFlops
    roofline: Roofline
    best: Prediction
    worst: Prediction
    trained: int
    frozen: int

    @property
    def limit(self) -> float:
        """Bytes of a device that a step should not exceed."""
        return USABLE * self.target.chip.hbm

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed <= self.limit

    @property
    def micro_rows(self) -> int:
        """Rows of a forward pass, over all devices."""
        return self.config.data.rows_per_pass


def plan_compiled(
    config: Config,
    architecture: Architecture,
    target: PlannedDevices,
    devices: Sequence[Any],
) -> Plan:
    """Compiles the train step for `devices` of `compiled.topology_devices`.

    Raises:
      UserError: rows or dimensions do not fit the model or the mesh.
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    step = abstract_step.make_abstract_step(config, architecture, mesh)
    logging.info("compiling the train step for %s", target.name)
    result = compile_step.compile_step(step, memory_formulas.head_chunks(step))
    source, found, moved = "compiled", result.collectives, result.moved
    if result.memory is None:
        source = "refused"
        found = memory_formulas.estimate_collectives(step)
        moved = memory_formulas.estimate_moved(step)
    return _assemble(
        step, target, source, result.seconds, result.memory, result.needed,
        found, moved,
    )  # fmt: skip


def plan_estimate(
    config: Config, architecture: Architecture, target: PlannedDevices
) -> Plan:
    """The plan by formula alone, without a compiler.

    Raises:
      UserError: rows or dimensions do not fit the model or the mesh.
    """
    mesh = meshes.make_mesh(config.mesh, target.devices())
    step = abstract_step.make_abstract_step(config, architecture, mesh)
    memory = memory_formulas.estimate_memory(step)
    return _assemble(
        step, target, "estimated", 0.0, memory, memory.total,
        memory_formulas.estimate_collectives(step),
        memory_formulas.estimate_moved(step),
    )  # fmt: skip


def _assemble(
    step: AbstractStep,
    target: PlannedDevices,
    source: str,
    seconds: float,
    memory: MemoryUse | None,
    needed: float,
    found: list[Collective],
    moved: float,
) -> Plan:
    mesh = step.definition.mesh
    flops = step_flops.count_step_flops(step)
    line = rooflines.make_roofline(flops, moved, found, target, mesh)
    predictions = [
        rooflines.predict(s, flops, step.tokens, step.config.steps, target)
        for s in (line.overlapped, line.summed)
    ]
    return Plan(
        target=target,
        config=step.config,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        source=source,
        seconds=seconds,
        memory=memory,
        needed=needed,
        traffic=summarize(found),
        flops=flops,
        roofline=line,
        best=predictions[0],
        worst=predictions[1],
        trained=parameter_paths.count(step.state.params),
        frozen=parameter_paths.count(step.frozen),
    )
