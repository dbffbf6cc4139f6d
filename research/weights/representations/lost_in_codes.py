"""A weight of a file beside its codes: what these have lost of it."""

import dataclasses

import jax
import jax.numpy as jnp

from research.weights.contraction import materialize
from research.weights.representations.leaf import Matrix

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LostInCodes:
    """A weight and its codes; the difference is not computed yet.

    Attributes:
      weight: `[*stack, *in, *out]`, as the file has it.
      codes: of the same shape.
    """

    weight: Array
    codes: Matrix

    def subtract(self) -> Array:
        """The weight less what its codes stand for, float32."""
        codes = materialize(self.codes).astype(jnp.float32)
        return self.weight.astype(jnp.float32) - codes
