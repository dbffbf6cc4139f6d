"""The real train step, compiled for TPUs that are not there."""

import dataclasses
import importlib.util
import logging
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from research.core.errors import UserError
from research.plan.abstract_step import AbstractStep, device_bytes, optimizer_bytes
from research.plan.compiled import hbm_traffic, hlo_text
from research.plan.compiled.collectives import Collective, find_collectives
from research.plan.planned_devices import PlannedDevices
from research.train.step import train_step

_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDED = (
    rf"total memory required for HLO temporaries \({_SIZE}\)",
    rf"Used {_SIZE} of [\d.]+[KMGT]? hbm",
    rf"total hbm usage >= {_SIZE}",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of one device's memory that a step uses, by what they hold.

    Attributes:
      frozen: parameters that are not trained.
      trained: parameters that are.
      optimizer: its moments, and what else is in the state.
      batch: of one step.
      temporaries: activations, gradients, gathered weights.
      padding: of all arguments, to the tiles of the chip.
      program: the code, where the compiler keeps it in the same memory.
    """

    frozen: float
    trained: float
    optimizer: float
    batch: float
    temporaries: float
    padding: float = 0.0
    program: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler said.

    Attributes:
      memory: None where the step does not fit.
      needed: bytes of a device, whether they fit or not.
      collectives: of a step.
      moved: bytes to and from a device's memory in a step.
      seconds: that compiling took.
    """

    memory: MemoryUse | None
    needed: float
    collectives: list[Collective]
    moved: float
    seconds: float


def topology_devices(target: PlannedDevices) -> list[jax.Device]:
    """Devices to compile for.

    Raises:
      UserError: libtpu is not installed, or has no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {target.name} needs libtpu: pip install libtpu in an "
            f"environment of its own, or --device={target.name} for the estimate alone"
        )
    shape = "x".join(map(str, target.shape))
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{target.chip.name}:{shape}",
            num_slices=target.slices,
        )
    except Exception as error:  # Whatever the plug-in raises.
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"libtpu cannot plan for {target.name} ({first_line}); "
            f"--device={target.chip.name}:{shape} gives the estimate alone"
        ) from error
    devices = list(topology.devices)
    if len(devices) != target.count:
        raise UserError(
            f"libtpu counts {len(devices)} devices in {target.name}, which has "
            f"{target.count} chips: it would compile for their halves; "
            f"--device={target.chip.name}:{shape} gives the estimate alone"
        )
    return devices


def lower(step: AbstractStep) -> jax.stages.Lowered:
    """The train step of training, lowered for the devices of its mesh."""
    jitted = train_step.jit_train_step(step.definition)
    return jitted.lower(step.state, step.frozen, step.batch)


def compile_step(step: AbstractStep, unknown_trips: float) -> CompiledStep:
    """Compiles the train step, and reads what it needs from the result.

    Args:
      step: of the step, on a mesh of topology devices.
      unknown_trips: see `hlo.executions`.

    Raises:
      UserError: the compiler refuses it for another reason than its memory.
    """
    begun = time.monotonic()
    lowered = lower(step)
    logging.info("lowered in %.1f s; compiling", time.monotonic() - begun)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = read_needed(str(error))
        if needed is None:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"the compiler refuses the step: {first_line}") from error
        return CompiledStep(None, needed, [], 0.0, time.monotonic() - begun)
    seconds = time.monotonic() - begun
    memory = split_memory(step, compiled.memory_analysis())
    module = hlo_text.parse(compiled.as_text())
    found = find_collectives(module, step.definition.mesh, unknown_trips)
    moved = hbm_traffic.count_bytes(module, unknown_trips)
    return CompiledStep(memory, memory.total, found, moved, seconds)


def split_memory(step: AbstractStep, stats: Any) -> MemoryUse:
    """The compiler's totals, its arguments told apart by their shapes."""
    arguments = {
        "frozen": device_bytes(step.frozen),
        "trained": device_bytes(step.state.params),
        "optimizer": optimizer_bytes(step),
        "batch": device_bytes(step.batch),
    }
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return MemoryUse(
        **arguments,
        temporaries=stats.temp_size_in_bytes + results,
        padding=stats.argument_size_in_bytes - sum(arguments.values()),
        program=stats.generated_code_size_in_bytes,
    )


def read_needed(message: str) -> float | None:
    """Bytes that a step would have needed, by the compiler's complaint.

    Returns:
      None where it complains of something else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _NEEDED:
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * _UNITS[found[2]]
    return None
