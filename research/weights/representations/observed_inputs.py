"""A weight that measures what it is multiplied with: sums for principal directions.

    measure = jax.grad(lambda sums: run(ObservedInputs(weight, basis, sums, mask)))
    sums = measure(InputSums.zeros(basis))

A product gives `x` to a function whose derivative by `sums` is not a derivative, but
what should be added up of `x`. So the sums come out of a scan over layers, are added
over devices, and no activation is ever kept beyond the backward pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.contraction import contract, materialize
from research.weights.representations.leaf import Leaf, Matrix

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputSums:
    """Sums over tokens x `[in]`, all float32.

    Attributes:
      products: `[*stack, in, k]`, of x (x basis).
      total: `[*stack, in]`, of x.
      squares: `[*stack]`, of |x|^2.
    """

    products: Array
    total: Array
    squares: Array

    @classmethod
    def zeros(cls, basis: Array) -> "InputSums":
        """For a `basis` `[*stack, in, k]`."""
        stack, inputs = basis.shape[:-2], basis.shape[-2]
        return cls(
            jnp.zeros_like(basis),
            jnp.zeros((*stack, inputs), jnp.float32),
            jnp.zeros(stack, jnp.float32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObservedInputs(Leaf):
    """`base`, whose products add to `sums` on the way back.

    Attributes:
      base: the frozen weight, `[*stack, *in, *out]`.
      basis: `[*stack, in, k]` float32, with all input axes as one.
      sums: of the tokens that `mask` counts.
      mask: `[*stack, rows, seq]` float32, 1 for a token that counts, else 0.
    """

    base: Matrix
    basis: Array
    sums: InputSums
    mask: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        x = _observed(x, self.mask, self.basis, self.sums)
        return contract(x, self.base, n_in, dtype)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        raise NotImplementedError("rows of a table have no inputs")

    def transpose(self) -> Matrix:
        raise NotImplementedError("a head has its inputs behind the last layer")

    def materialize(self) -> Array:
        return materialize(self.base)


@jax.custom_vjp
def _observed(x: Array, mask: Array, basis: Array, sums: InputSums) -> Array:
    """`x`, `[rows, seq, *in]`."""
    return x


def _forward(x, mask, basis, sums):
    return x, (x, mask, basis)


def _backward(kept, d_x):
    x, mask, basis = kept
    tokens = x.astype(jnp.float32).reshape(*mask.shape, -1) * mask[..., None]
    along = jnp.einsum("bti,ik->btk", tokens, basis, precision="highest")
    sums = InputSums(
        products=jnp.einsum("bti,btk->ik", tokens, along, precision="highest"),
        total=jnp.sum(tokens, (0, 1)),
        squares=jnp.sum(jnp.square(tokens)),
    )
    return d_x, jnp.zeros_like(mask), jnp.zeros_like(basis), sums


_observed.defvjp(_forward, _backward)
