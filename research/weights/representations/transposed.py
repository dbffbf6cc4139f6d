"""A matrix used from its other side."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.representations.grouped_product import Groups, multiply_groups
from research.weights.representations.leaf import Leaf
from research.weights.representations.plain_array import multiply

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(Leaf):
    """A two-axis matrix used from its other side, without a copy in that layout.

    Attributes:
      of: `[out, in]`, such as an embedding table used as vocabulary head. A product
        alone may also sum over several axes, `[out, *in]`, and one of sorted rows have
        several matrices, `[matrices, out, in]`.
    """

    of: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.of.shape))

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        return multiply(x, self.of, n_in, True, dtype)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        return multiply_groups(x, self.of, groups, True, dtype)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        return jnp.moveaxis(jnp.take(self.of, ids, axis=1), 0, -1).astype(dtype)

    def transpose(self) -> Array:
        return self.of

    def materialize(self) -> Array:
        return self.of.T
