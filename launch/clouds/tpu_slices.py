"""Names, shapes and hosts of TPU slices in Google's clouds.

Sources:
  types     https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: the name of a type
            counts TensorCores for v4 and v5p (two a chip), chips for v5e and v6e.
  runtimes  https://cloud.google.com/tpu/docs/runtimes: the table for JAX.
  gke       https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: node
            selectors, and the chips of a node: slices of several hosts have 4 on each.
"""

import dataclasses
import math
from collections.abc import Mapping

from research.config.run_config import Config
from research.core.errors import UserError
from research.parallel.chips import CHIPS, Chip
from research.plan.planned_devices import parse_topology


@dataclasses.dataclass(frozen=True)
class TpuGeneration:
    """One generation of TPUs.

    Attributes:
      type: the first part of an accelerator type.
      counted: how much a chip adds to the number in the type.
      runtime: software version of a TPU VM for JAX.
      gke: node selector `cloud.google.com/gke-tpu-accelerator`.
    """

    type: str
    counted: int
    runtime: str
    gke: str


GENERATIONS: Mapping[str, TpuGeneration] = {
    "v4": TpuGeneration("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": TpuGeneration("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": TpuGeneration("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": TpuGeneration("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}
HOSTED = 4  # chips per host in a slice of several hosts


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """Chips of one kind in a torus; `shape` is its sizes, as `4x4`."""

    chip: Chip
    shape: str

    @property
    def generation(self) -> TpuGeneration:
        return GENERATIONS[self.chip.name]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        """Number of hosts; each runs one process."""
        return 1 if self.chips <= self.chip.hosted else self.chips // HOSTED

    @property
    def name(self) -> str:
        """As users write it, `v5e:4x4`."""
        return f"{self.chip.name}:{self.shape}"

    @property
    def type(self) -> str:
        """The accelerator type of gcloud and SkyPilot, as `v5litepod-16`.

        Raises:
          UserError: the type of so many chips stands for a slice of another shape.
        """
        if self.shape not in self.chip.shapes:
            raise UserError(
                f"the topology is {self.name}, which no accelerator type names; "
                f"choose one of {', '.join(self.chip.shapes)}"
            )
        return f"{self.generation.type}-{self.chips * self.generation.counted}"


def named(topology: str, flag: str) -> TpuSlice:
    """The slice that a topology such as `v5e:4x4` names; errors name `flag`.

    Raises:
      UserError: the topology is missing, or there is no such slice.
    """
    if not topology:
        raise UserError(
            f"no topology: give {flag}, or --config.runtime.topology=v5e:4x4 after --"
        )
    target = parse_topology(topology, flag=flag)
    return TpuSlice(target.chip, "x".join(map(str, target.shape)))


def of_type(text: str, flag: str) -> TpuSlice:
    """The slice that a type such as `v5litepod-16` names; errors name `flag`.

    Raises:
      UserError: `research/parallel/chips.py` has no slice of that type.
    """
    known = {
        found.type: found
        for name in GENERATIONS
        for shape in CHIPS[name].shapes
        for found in [TpuSlice(CHIPS[name], shape)]
    }
    if text not in known:
        raise UserError(f"{flag} is {text!r}; it must be one of {', '.join(known)}")
    return known[text]


def only(config: Config, type_: str, flag: str, example: str) -> TpuSlice:
    """The one slice of a job: `type_`, the value of `flag`, or else the config's.

    Raises:
      UserError: there is no such slice, or the config names several.
    """
    if config.runtime.slices > 1:
        raise UserError(
            f"config.runtime.slices is {config.runtime.slices}, and this target rents "
            "one slice: launch it on gke, which joins several, or set it to 1"
        )
    if type_:
        return of_type(type_, flag)
    return named(config.runtime.topology, example)
