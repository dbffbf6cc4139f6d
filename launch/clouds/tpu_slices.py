"""TPU slices as Google's clouds name and cut them.

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
    """One generation.

    Attributes:
      type: how an accelerator type begins.
      counted: what a type's number counts, a chip.
      runtime: software of a TPU VM for JAX.
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
HOSTED = 4  # chips of one host of several


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """`shape` is the torus, as `4x4`."""

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
        """How many run a process each."""
        return 1 if self.chips <= self.chip.hosted else self.chips // HOSTED

    @property
    def type(self) -> str:
        """As gcloud and SkyPilot take it: `v5litepod-16`."""
        return f"{self.generation.type}-{self.chips * self.generation.counted}"


def named(topology: str, flag: str) -> TpuSlice:
    """`v5e:4x4`, as `flag` gives it.

    Raises:
      UserError: it is missing, or there is no such slice.
    """
    if not topology:
        raise UserError(
            f"no topology: give {flag}, or --config.runtime.topology=v5e:4x4 after --"
        )
    target = parse_topology(topology, flag=flag)
    return TpuSlice(target.chip, "x".join(map(str, target.shape)))


def of_type(text: str, flag: str) -> TpuSlice:
    """`v5litepod-16`, as `flag` gives it.

    Raises:
      UserError: there is no such type in `research/chips.py`.
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
    """The one slice of a job: `type_`, as `flag` gives it, or else the config's.

    Raises:
      UserError: there is no such slice, or the config wants several.
    """
    if config.runtime.slices > 1:
        raise UserError(
            f"config.runtime.slices is {config.runtime.slices}, and a job has one "
            "slice here: launch it on gke, which joins several, or set it to 1"
        )
    if type_:
        return of_type(type_, flag)
    return named(config.runtime.topology, example)


def default_type(chosen: TpuSlice, flag: str) -> str:
    """The type, which stands for one shape of so many chips.

    Raises:
      UserError: for another shape than this one.
    """
    if chosen.shape not in chosen.chip.shapes:
        raise UserError(
            f"{flag} is {chosen.chip.name}:{chosen.shape}, which no accelerator type "
            f"names; choose one of {', '.join(chosen.chip.shapes)}"
        )
    return chosen.type
