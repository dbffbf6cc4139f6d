"""A frozen weight with a low-rank update, whose outputs have trained lengths."""

import dataclasses
from collections.abc import Callable
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
from research.weights.over_stack import over_stack
from research.weights.representations.grouped_product import Groups
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightDecomposed(Leaf):
    """`inner` with each output multiplied by `gain`, as DoRA has it.

    Liu et al. 2024, arXiv:2402.09353, equation 5.

    Attributes:
      inner: the sum of the frozen weight and its update.
      gain: `[*stack, *out]` float32, see `gain_of`.
      flipped: whether the gain is one of inputs, as in a transposed matrix.
    """

    inner: LowRank
    gain: Array
    flipped: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        if self.flipped:
            return contract(times_gain(x, self.gain), self.inner, n_in, dtype)
        return self._decomposed(x, lambda x, w: contract(x, w, n_in, dtype), self.gain)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        return self._decomposed(
            x,
            lambda x, w: contract_groups(x, w, groups, dtype),
            self.gain[groups.owners],
        )

    def lookup(self, ids: Array, dtype: Any) -> Array:
        if self.flipped:
            return self.materialize()[ids].astype(dtype)
        return times_gain(lookup(self.inner, ids, dtype), self.gain)

    def transpose(self) -> "WeightDecomposed":
        return dataclasses.replace(
            self, inner=transpose(self.inner), flipped=not self.flipped
        )

    def materialize(self) -> Array:
        """The product is formed in float32 and returned in the dtype of the base."""
        base, stack = materialize(self.inner.base), self.inner.scale.ndim
        whole, gain = base.astype(jnp.float32) + self.inner.update(), self.gain
        if self.flipped:
            gain = jnp.expand_dims(gain, -1)
        else:
            gain = jnp.expand_dims(gain, range(stack, stack + whole.ndim - gain.ndim))
        return (whole * gain).astype(base.dtype)

    def _decomposed(
        self, x: Array, multiply: Callable[[Array, Matrix], Array], gain: Array
    ) -> Array:
        inner = dataclasses.replace(self.inner, key=None, rate=None)
        if self.inner.key is None:
            return times_gain(multiply(x, inner), gain)
        # As in PEFT: the frozen weight sees all inputs once, and what is added to that
        # product sees those that are left.
        left = self.inner.dropped(x)
        added = times_gain(multiply(left, inner), gain) - multiply(left, inner.base)
        return multiply(x, inner.base) + added


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormedWeight:
    """A frozen weight, and the length of each output of it with its update.

    Attributes:
      base: the weight.
      norm: `[*stack, *out]` float32.
    """

    base: Matrix
    norm: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)


@jax.jit
def output_norms(weight: LowRank) -> Array:
    """The length of each output's weights, `[*stack, *out]` float32.

    The sum is not formed: |w + s a b|^2 = |w|^2 + 2 s (w a) b + s^2 b (a a) b for one
    output, where products of w and a, and of a and a, sum over the inputs.
    """
    n_in = weight.a.ndim - 1 - weight.scale.ndim

    def one(parts: tuple[Matrix, Array, Array, Array]) -> Array:
        base, a, b, scale = parts
        into = tuple(range(n_in))
        square = jnp.sum(jnp.square(materialize(base).astype(jnp.float32)), into)
        rows = jnp.moveaxis(a, -1, 0)
        cross = jnp.sum(b * contract(rows, base, n_in, jnp.float32), 0)
        inner = jnp.tensordot(jnp.tensordot(a, a, (into, into)), b, 1)
        square += scale * (2 * cross + scale * jnp.sum(b * inner, 0))
        # A column of zeros stays one: its gain is 0, and not 0 / 0.
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))

    norms = over_stack(one, weight.scale.ndim)
    return norms((weight.base, weight.a, weight.b, weight.scale))


def gain_of(length: Array, norm: Array) -> Array:
    """The trained `length` over the `norm` that it has without; 1 for a zero.

    A length of zero gets no gradient.
    """
    return jnp.where(length == 0, 1.0, length / norm)


def times_gain(x: Array, gain: Array) -> Array:
    """`x` times `gain`, whose axes are the last ones of `x`.

    In float32, as a gain is near 1, where bfloat16 has few numbers.
    """
    gain = jnp.expand_dims(gain, range(x.ndim - gain.ndim))
    return (x.astype(jnp.float32) * gain).astype(x.dtype)
