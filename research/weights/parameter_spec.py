"""The description of a parameter before it exists: shape, axis names, initialisation.

A leaf of several arrays is described by the leaf itself with a `Spec` in the place of
each array: `{"a": Spec, "b": Spec}` for the factors of an adapter, or an instance of a
`Leaf` class whose fields are `Spec`s. A tree of specs therefore has the very structure
of the tree of values, and `jax.tree.map` makes shapes, shardings or values of it.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Spec:
    """One array of a parameter before it exists.

    Attributes:
      shape: its full shape, stacking axes first.
      axes: one logical name per axis; `mesh.py` maps names to mesh axes.
      n_in: number of axes, after the stacking ones, that `contract` sums over.
        0 marks a parameter that is not a matrix (a norm's scale).
      stacked: number of leading axes that count copies (1 for scanned layers).
      std: standard deviation of its random initialisation; 0 gives `fill` everywhere.
      fill: its initial value where `std` is 0.
      fixed: it lies among trained parameters, and is not trained.
      layers: of the first axis, those that are not zero for ever; empty: all.
      dtype: name of its dtype, where that is fixed (codes of a quantized weight);
        None for the dtype of the tree that it belongs to.
      keeps_odd_axes: an axis that the mesh does not divide stays whole, where for all
        else it is an error: of arrays that are small beside their matrix (scales).
      names: of the modules that hold it in other tools' files, with `{}` for the layer.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    n_in: int = 1
    stacked: int = 0
    std: float = 0.02
    dtype: str | None = None
    names: tuple[str, ...] = ()
    fill: float = 1.0
    fixed: bool = False
    layers: tuple[int, ...] = ()
    keeps_odd_axes: bool = False

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.shape[self.stacked : self.stacked + self.n_in]

    def of_stack(self, axes: int) -> "Spec":
        """One of those that the first `axes` stacking axes count."""
        return dataclasses.replace(
            self,
            shape=self.shape[axes:],
            axes=self.axes[axes:],
            stacked=self.stacked - axes,
        )

    @property
    def copies(self) -> int:
        """How many stacked arrays it has, without those that are zero for ever."""
        whole = math.prod(self.shape[: self.stacked])
        return whole // self.shape[0] * len(self.layers) if self.layers else whole

    @property
    def is_table(self) -> bool:
        """Whether its rows belong to ids: embeddings, which a tied head shares."""
        return self.n_in == 1 and not self.stacked and self.axes[0] == "vocab"

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
