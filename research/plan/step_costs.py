"""The cost of one step for one device: bytes of memory, and bytes sent to others.

Both the formulas (`estimate/`) and the compiler (`compiled/`) answer in these types.
"""

import collections
import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of one device's memory during a step, by what they hold.

    Attributes:
      frozen: parameters that are not trained.
      trained: parameters that are trained.
      optimizer: the optimizer's moments and the step counter.
      batch: the batch of one step.
      temporaries: activations, gradients and gathered weights.
      padding: padding of all arguments to the tiles of the chip.
      program: the compiled code, where it lies in the same memory.
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
class Collective:
    """One collective operation, as one device sees it.

    Attributes:
      kind: XLA's name for it, such as `all-gather`.
      axes: the mesh axes along which its devices differ.
      nbytes: size of the whole array: what an all-gather ends with, what a
        reduce-scatter starts from, what every device holds for the other kinds.
      times: how often a step runs it.
      members: the devices of its first group, as indices into the mesh. All groups
        are alike.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    times: float
    members: tuple[int, ...]

    @property
    def label(self) -> str:
        return "*".join(self.axes) or "?"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same axes, summed over a step.

    Attributes:
      count: how many of them run.
      nbytes: their bytes, counted as in `Collective.nbytes`.
    """

    kind: str
    axes: str
    count: float
    nbytes: float


def summarize(found: Iterable[Collective]) -> list[Traffic]:
    """Sums collectives by kind and axes; the largest sum comes first."""
    count: dict[tuple[str, str], float] = collections.Counter()
    nbytes: dict[tuple[str, str], float] = collections.Counter()
    for collective in found:
        key = (collective.kind, collective.label)
        count[key] += collective.times
        nbytes[key] += collective.times * collective.nbytes
    rows = [Traffic(*key, count[key], nbytes[key]) for key in count]
    return sorted(rows, key=lambda row: -row.nbytes)
