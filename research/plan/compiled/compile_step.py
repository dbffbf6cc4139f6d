"""Compiles the real train step for TPUs that this machine does not have."""

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
from research.plan.compiled import hlo_text
from research.plan.compiled.collectives import find_collectives
from research.plan.planned_devices import PlannedDevices
from research.plan.step_costs import Collective, MemoryUse
from research.train.step import train_step

_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDED = (
    rf"total memory required for HLO temporaries \({_SIZE}\)",
    rf"Used {_SIZE} of [\d.]+[KMGT]? hbm",
    rf"total hbm usage >= {_SIZE}",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's numbers about a step.

    Attributes:
      memory: None if the step does not fit.
      needed: bytes that a device needs, whether they fit or not.
      collectives: those of a step; empty if it does not fit.
      seconds: time that compiling took.
    """

    memory: MemoryUse | None
    needed: float
    collectives: list[Collective]
    seconds: float


def topology_devices(target: PlannedDevices) -> list[jax.Device]:
    """Returns libtpu's devices to compile for.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {target.name} needs libtpu: pip install libtpu in an "
            f"environment of its own, or use --device={target.name} for an estimate"
        )
    shape = "x".join(map(str, target.shape))
    try:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{target.chip.name}:{shape}",
            num_slices=target.slices,
        )
    except Exception as error:  # The plug-in may raise anything.
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"libtpu cannot plan for {target.name} ({first_line}); "
            f"--device={target.chip.name}:{shape} gives an estimate"
        ) from error
    devices = list(topology.devices)
    if len(devices) != target.count:
        raise UserError(
            f"libtpu counts {len(devices)} devices in {target.name}, which has "
            f"{target.count} chips: it would compile for halves of chips; "
            f"--device={target.chip.name}:{shape} gives an estimate"
        )
    return devices


def lower(step: AbstractStep) -> jax.stages.Lowered:
    """Lowers the train step, made as training makes it, for the devices of its mesh."""
    jitted = train_step.jit_train_step(step.definition)
    return jitted.lower(step.state, step.frozen, step.batch)


def compile_step(step: AbstractStep, unknown_trips: float) -> CompiledStep:
    """Compiles the train step and reads its memory and collectives from the result.

    The step lies on a mesh of `topology_devices`; `unknown_trips` is that of
    `hlo_text.executions`.

    Raises:
      UserError: the compiler refuses the step for another reason than memory.
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
        return CompiledStep(None, needed, [], time.monotonic() - begun)
    seconds = time.monotonic() - begun
    memory = split_memory(step, compiled.memory_analysis())
    program = hlo_text.parse(compiled.as_text())
    found = find_collectives(program, step.definition.mesh, unknown_trips)
    return CompiledStep(memory, memory.total, found, seconds)


def split_memory(step: AbstractStep, stats: Any) -> MemoryUse:
    """Splits the compiler's total of all arguments by the shapes of the arguments."""
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
    """Reads from the compiler's error how many bytes a step would have needed.

    Returns:
      None if the error is about something else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _NEEDED:
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * _UNITS[found[2]]
    return None
