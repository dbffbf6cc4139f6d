"""A frozen weight with a trained low-rank update, kept in factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.contraction import (
    contract,
    contract_groups,
    lookup,
    materialize,
    transpose,
)
from research.weights.representations.grouped_product import Groups
from research.weights.representations.leaf import Leaf, Matrix

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Leaf):
    """`base + scale * a @ b`, kept in factors so that no full matrix is formed.

    With dropout, `key` and `rate` are not None and inputs of the adapter are dropped at
    `rate` (Hu et al. 2021, arXiv:2106.09685, section 4.1 and its reference code).

    Attributes:
      base: the frozen weight, shape `[*stack, *in, *out]`.
      a: `[*stack, *in, rank]`.
      b: `[*stack, rank, *out]`.
      scale: `[*stack]`, alpha / rank or alpha / sqrt(rank).
      key: `[*stack]` typed PRNG keys, or None for no dropout.
      rate: `[*stack]`, share of adapter inputs dropped. An array, because adapters
        that train together may differ in it.
    """

    base: Matrix
    a: Matrix
    b: Matrix
    scale: Array
    key: Array | None = None
    rate: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        low = contract(self.dropped(x), self.a, n_in) * self.scale.astype(x.dtype)
        return contract(x, self.base, n_in, dtype) + contract(low, self.b, 1, dtype)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        """Each row goes through the adapter of its own matrix; those share `key[0]`."""
        low = contract_groups(self.dropped(x), self.a, groups)
        low *= self.scale[groups.owners][:, None].astype(x.dtype)
        base = contract_groups(x, self.base, groups, dtype)
        return base + contract_groups(low, self.b, groups, dtype)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        """Dropout does not apply: a one-hot row has only whole tokens to drop."""
        low = lookup(self.a, ids, dtype) * self.scale.astype(dtype)
        return lookup(self.base, ids, dtype) + contract(low, self.b)

    def transpose(self) -> "LowRank":
        return dataclasses.replace(
            self,
            base=transpose(self.base),
            a=transpose(self.b),
            b=transpose(self.a),
        )

    def materialize(self) -> Array:
        """The sum is formed in float32 and returned in the dtype of the base."""
        base = materialize(self.base)
        return (base.astype(jnp.float32) + self.update()).astype(base.dtype)

    def update(self) -> Array:
        """`scale * a @ b` as one float32 array; the axes of `scale` are stacked."""

        def one(a: Array, b: Array, scale: Array) -> Array:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return jnp.tensordot(a, b, axes=1, precision="highest") * scale

        for _ in range(self.scale.ndim):
            one = jax.vmap(one)
        return one(materialize(self.a), materialize(self.b), self.scale)

    def dropped(self, x: Array) -> Array:
        """The inputs of the adapter: `x` with dropout, if there is any."""
        if self.key is None:
            return x
        key, rate = (y[0] if jnp.ndim(y) else y for y in (self.key, self.rate))
        share = 1.0 - jnp.asarray(rate, jnp.float32)
        keep = jax.random.bernoulli(key, share, x.shape)
        return jnp.where(keep, x / share.astype(x.dtype), jnp.zeros_like(x))
