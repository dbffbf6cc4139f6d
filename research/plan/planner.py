"""Plans a config on chips: whether it fits, how fast it can be, and what is sent."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from research.config.run_config import Config
from research.models.architecture import Architecture
from research.parallel import mesh as meshes
from research.parallel.chips import GIB
from research.plan import abstract_step
from research.plan.abstract_step import AbstractStep
from research.plan.compiled import compile_step
from research.plan.estimate import memory_formulas, step_flops
from research.plan.estimate import roofline as rooflines
from research.plan.estimate.roofline import Prediction, Roofline
from research.plan.estimate.step_flops import StepFlops
from research.plan.planned_devices import PlannedDevices
from research.plan.step_costs import Collective, MemoryUse, Traffic, summarize
from research.weights import parameter_paths

# A run should leave the rest of a chip's memory free for what no plan sees:
# fragmentation, the next batch, the held-out rows.
USABLE = 0.92
# JAX by itself takes this share of a GPU's memory:
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
JAX_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Plan:
    """The facts about a config on some chips that are known before anyone rents them.

    Attributes:
      mesh: size of each mesh axis above 1.
      source: `compiled`, `estimated`, or `refused`: the compiler says that the step
        needs too much memory, and the collectives are estimated.
      seconds: time that compiling took.
      memory: bytes by what they hold; None if `source` is `refused`.
      needed: bytes that a device needs in its worst phase.
      phase: that phase: `step`, or one of `memory_formulas.peaks_between_steps`.
      flops: FLOPs of a step over all devices.
      roofline: seconds of a step by what it waits for. Memory traffic is always
        estimated by formula.
      best: the run if everything overlaps; no run is faster.
      worst: the run if nothing overlaps and each part runs at its peak.
      trained, frozen: numbers of scalars.
      frozen_forms: bytes of frozen weights that a device holds, by how they are stored.
    """

    target: PlannedDevices
    config: Config
    mesh: dict[str, int]
    source: str
    seconds: float
    memory: MemoryUse | None
    needed: float
    phase: str
    traffic: list[Traffic]
    flops: StepFlops
    roofline: Roofline
    best: Prediction
    worst: Prediction
    trained: int
    frozen: int
    frozen_forms: dict[str, int]

    @property
    def limit(self) -> float:
        """Bytes of a device that a run should not exceed."""
        return USABLE * self.target.chip.hbm

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed <= self.limit

    @property
    def setting(self) -> str:
        """The variable without which JAX takes less of a GPU than the plan needs."""
        share = self.needed / self.target.chip.hbm
        if self.target.chip.platform != "gpu" or not JAX_SHARE < share <= USABLE:
            return ""
        return f"XLA_CLIENT_MEM_FRACTION={USABLE}"

    @property
    def largest_part(self) -> str:
        """The part of a step's memory that takes most, in words."""
        if self.memory is None:
            return "the compiler does not say for what"
        parts = {
            "frozen weights": self.memory.frozen,
            "trained weights": self.memory.trained,
            "optimizer state": self.memory.optimizer,
            "activations and gradients": self.memory.temporaries,
        }
        name = max(parts, key=lambda part: parts[part])
        return f"{parts[name] / GIB:.1f} GiB of it {name}"

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
    """Compiles the train step for `devices` of `compile_step.topology_devices`.

    Raises:
      UserError: rows or dimensions do not fit the model or the mesh.
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    step = abstract_step.make_abstract_step(config, architecture, mesh)
    logging.info("compiling the train step for %s", target.name)
    result = compile_step.compile_step(step, memory_formulas.head_chunks(step))
    fits = result.memory is not None
    found = result.collectives if fits else memory_formulas.estimate_collectives(step)
    made = _assemble(step, target, result.memory, result.needed, found)
    source = "compiled" if fits else "refused"
    return dataclasses.replace(made, source=source, seconds=result.seconds)


def plan_estimate(
    config: Config, architecture: Architecture, target: PlannedDevices
) -> Plan:
    """Plans by formula alone, without a compiler.

    Raises:
      UserError: rows or dimensions do not fit the model or the mesh.
    """
    mesh = meshes.make_mesh(config.mesh, target.devices())
    step = abstract_step.make_abstract_step(config, architecture, mesh)
    memory = memory_formulas.estimate_memory(step)
    found = memory_formulas.estimate_collectives(step)
    return _assemble(step, target, memory, memory.total, found)


def _assemble(
    step: AbstractStep,
    target: PlannedDevices,
    memory: MemoryUse | None,
    needed: float,
    found: list[Collective],
) -> Plan:
    mesh = step.definition.mesh
    peaks = {"step": needed, **memory_formulas.peaks_between_steps(step)}
    phase = max(peaks, key=peaks.__getitem__)
    flops = step_flops.count_step_flops(step)
    moved = memory_formulas.estimate_moved(step)
    line = rooflines.make_roofline(flops, moved, found, target, mesh)
    # Epochs are as many steps as their rows fill, and a plan reads no data.
    steps = None if step.config.epochs else step.config.steps
    best, worst = (
        rooflines.predict(seconds, flops, step.tokens, steps, target)
        for seconds in (line.overlapped, line.summed)
    )
    return Plan(
        target=target,
        config=step.config,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        source="estimated",
        seconds=0.0,
        memory=memory,
        needed=peaks[phase],
        phase=phase,
        traffic=summarize(found),
        flops=flops,
        roofline=line,
        best=best,
        worst=worst,
        trained=step.definition.trainable.count,
        frozen=parameter_paths.count(step.definition.trainable.used(step.frozen)),
        frozen_forms=parameter_paths.bytes_by_form(
            step.frozen, abstract_step.device_bytes
        ),
    )
