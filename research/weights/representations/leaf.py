"""The protocol of a weight that is not a plain array."""

import abc
from typing import Any, TypeAlias

import jax

from research.weights.representations.grouped_product import Groups, multiply_groups

Array = jax.Array


class Leaf(abc.ABC):
    """A value that stands where an array stands in a model's parameters.

    A subclass is a frozen dataclass that is registered as a pytree
    (`jax.tree_util.register_dataclass`), so `jit`, `scan`, `vmap`, `remat`, sharding
    and checkpoints handle its arrays without knowing the class. Where the parameter is
    stacked over layers, each of its arrays has the stacking axes first. The same class
    with a `Spec` in the place of each array describes the leaf before it exists.

    Callers use the functions of `research.weights.contraction`, which also accept
    plain arrays; only those functions call these methods.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this value stands for."""

    @abc.abstractmethod
    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        """Sums the last `n_in` axes of `x` with the first `n_in` of this weight.

        The result has `dtype`; weights are cast to `x.dtype`, never activations.
        """

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        """Each row of `x` times its own matrix of `[matrices, in, out]`.

        A class that can do so without making all matrices overrides this.
        """
        return multiply_groups(x, self.materialize(), groups, False, dtype)

    @abc.abstractmethod
    def lookup(self, ids: Array, dtype: Any) -> Array:
        """Rows `ids` of a matrix `[vocabulary, *out]`, in `dtype`."""

    @abc.abstractmethod
    def transpose(self) -> "Matrix":
        """A two-axis matrix with input and output swapped, without a copy."""

    @abc.abstractmethod
    def materialize(self) -> Array:
        """The array that this value stands for, with its stacking axes."""


Matrix: TypeAlias = Array | Leaf
