"""A frozen weight with many low-rank updates, one for each row of a batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.contraction import (
    contract,
    contract_groups,
    lookup,
    transpose,
)
from research.weights.representations.grouped_product import Groups
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank
from research.weights.representations.transposed import Transposed
from research.weights.representations.weight_decomposed import (
    WeightDecomposed,
    times_gain,
)

Array = jax.Array

# One product with all adapters of the bank reads them all. Gathering those of the batch
# copies them first, so it pays where the bank has this many times the rows of a batch:
# with 8 rows a CPU takes as long for it as for a product with about 12 adapters.
GATHER_ABOVE = 1.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBank(Leaf):
    """`base + scale[n] * a[n] @ b[n]` with n = `choice[i] - 1` for row i of a batch.

    Choice 0 is the base, which takes no room. The factors of all adapters lie side by
    side: adapter n has the rows of `a` and `b` from `n * rank` to `(n + 1) * rank`, and
    a smaller rank ends in zeros. Terms of other adapters are exactly zero, so they
    change no result. The outputs of `a` come first, since a CPU multiplies a few rows
    by such a matrix in two thirds of the time.

    Attributes:
      base: the frozen weight, `[*stack, *in, *out]`.
      a: `[*stack, adapters * rank, *in]`.
      b: `[*stack, adapters * rank, *out]`.
      scale: `[*stack, adapters]`.
      stretch: `[*stack, adapters, *out]` float32, the gain of each output in
        `WeightDecomposed` less 1, so that zeros are no gain; None in a bank without
        room for adapters that have one.
      flipped: the gain is one of inputs, as in a transposed matrix.
      choice: `[*stack, B]` int32, by row of the batch, which is the first axis of
        every input. None until `bound` sets it.
    """

    base: Matrix
    a: Array
    b: Array
    scale: Array
    stretch: Array | None = None
    choice: Array | None = None
    flipped: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def adapters(self) -> int:
        """How many adapters the bank holds, the base not included."""
        return self.scale.shape[-1]

    @property
    def rank(self) -> int:
        """The largest rank that an adapter can have."""
        return self.b.shape[self.scale.ndim - 1] // self.adapters

    def bound(self, choice: Array) -> Leaf:
        """The weight for a batch of which row i makes choice `choice[i]`, `[B]` int32.

        For a batch of one row it is the leaf of that adapter, without any other.
        """
        stack = self.scale.shape[:-1]
        if choice.shape[0] > 1:
            choice = jnp.broadcast_to(choice, (*stack, *choice.shape))
            return dataclasses.replace(self, choice=choice)
        n = jnp.maximum(choice[0] - 1, 0)
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim,
            start_index=n * self.rank,
            slice_size=self.rank,
            axis=len(stack),
        )
        index = functools.partial(
            jax.lax.dynamic_index_in_dim, index=n, axis=len(stack), keepdims=False
        )
        is_own = choice[0] > 0
        own = LowRank(
            self.base,
            Transposed(part(self.a)),
            part(self.b),
            jnp.where(is_own, index(self.scale), 0),
        )
        if self.stretch is None:
            return own
        return WeightDecomposed(own, 1 + jnp.where(is_own, index(self.stretch), 0))

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        if self.flipped:
            x = self._with_gain(x)
        y = contract(x, self.base, n_in, dtype) + self._update(x, n_in, dtype)
        return y if self.flipped else self._with_gain(y)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        choice = self.choice[0][groups.origins]
        low = contract_groups(x, Transposed(self.a), groups)
        low = self._own(low, choice, self.scale[groups.owners])
        base = contract_groups(x, self.base, groups, dtype)
        y = base + contract_groups(low, self.b, groups, dtype)
        if self.stretch is None:
            return y
        stretch = self.stretch[groups.owners, jnp.maximum(choice - 1, 0)]
        return times_gain(y, 1 + jnp.where(choice[:, None] > 0, stretch, 0))

    def lookup(self, ids: Array, dtype: Any) -> Array:
        if self.flipped:
            raise NotImplementedError("ids are looked up in a table as it lies")
        low = lookup(Transposed(self.a), ids, dtype)
        low = self._own(low, self.choice, self.scale[None])
        return self._with_gain(lookup(self.base, ids, dtype) + contract(low, self.b))

    def transpose(self) -> "AdapterBank":
        base, flipped = transpose(self.base), not self.flipped
        return dataclasses.replace(self, base=base, a=self.b, b=self.a, flipped=flipped)

    def materialize(self) -> Array:
        raise ValueError("a bank stands for another matrix in each row of a batch")

    def _update(self, x: Array, n_in: int, dtype: Any) -> Array:
        if self.adapters <= GATHER_ABOVE * x.shape[0]:
            low = contract(x, Transposed(self.a), n_in)
            low = self._own(low, self.choice, self.scale[None])
            return contract(low, self.b, 1, dtype)
        own = jnp.maximum(self.choice - 1, 0)
        a, b = self._gathered(own)
        scale = jnp.where(self.choice > 0, self.scale[own], 0).astype(x.dtype)

        def one(x: Array, a: Array, b: Array, scale: Array) -> Array:
            return contract(contract(x, Transposed(a), n_in) * scale, b, 1, dtype)

        return jax.vmap(one)(x, a, b, scale)

    def _with_gain(self, y: Array) -> Array:
        """`y`, `[B, ..., *out]`, times the gain of the adapter of each row."""
        if self.stretch is None:
            return y
        stretch = self.stretch[jnp.maximum(self.choice - 1, 0)]
        is_own = jnp.expand_dims(self.choice > 0, range(1, stretch.ndim))
        gain = 1 + jnp.where(is_own, stretch, 0)
        return times_gain(y, jnp.expand_dims(gain, range(1, 1 + y.ndim - gain.ndim)))

    def _own(self, low: Array, choice: Array, scale: Array) -> Array:
        """`low`, `[rows, ..., adapters * rank]`, scaled; zero for other adapters.

        `choice` is `[rows]`, and `scale` `[rows or 1, adapters]`.
        """
        owner = jnp.arange(low.shape[-1], dtype=jnp.int32) // self.rank + 1
        mine = choice[:, None] == owner[None]
        scale = jnp.repeat(scale, self.rank, axis=1).astype(low.dtype)
        between = range(1, low.ndim - 1)
        scaled = low * jnp.expand_dims(scale, between)
        # Not a product with 0, which a number that is not finite would survive.
        return jnp.where(jnp.expand_dims(mine, between), scaled, 0)

    def _gathered(self, own: Array) -> tuple[Array, Array]:
        """The factors by row of the batch: `[B, rank, *in]` and `[B, rank, *out]`."""

        def of_rows(x: Array) -> Array:
            x = x.reshape(self.adapters, self.rank, *x.shape[1:])
            # By default each number would be compared with the bounds of the bank.
            return jnp.take(x, own, axis=0, mode="clip")

        return of_rows(self.a), of_rows(self.b)
