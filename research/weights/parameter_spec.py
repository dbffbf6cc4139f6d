"""What is known of a parameter before it exists: shape, axis names, initialisation."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a parameter before it exists.

    Attributes:
      shape: its full shape, stacking axes first.
      axes: one logical name per axis; `mesh.py` maps names to mesh axes.
      n_in: how many axes, after the stacking ones, `contract` sums over.
        0 marks a parameter that is not a matrix (a norm's scale).
      stacked: how many leading axes count copies (1 for scanned layers).
      std: standard deviation of its random initialisation; 0 gives ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    n_in: int = 1
    stacked: int = 0
    std: float = 0.02

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.shape[self.stacked : self.stacked + self.n_in]

    @property
    def as_matrix(self) -> "Spec":
        """The same values as `[*stack, in, out]`, split by the first axis of each."""
        if not self.n_in:
            return self
        middle = self.stacked + self.n_in
        ends = (math.prod(self.in_shape), math.prod(self.shape[middle:]))
        return dataclasses.replace(
            self,
            shape=(*self.shape[: self.stacked], *ends),
            axes=(*self.axes[: self.stacked + 1], self.axes[middle]),
            n_in=1,
        )
