"""A frozen matrix in codes, which becomes an array inside each product with it.

The array of one matrix exists while it is multiplied, in the dtype of the computation.
On the way back it is made of the codes again, so no residual of a scan over layers
holds the weights of all of them.
"""

import abc
import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

from research.weights.parameter_spec import Spec
from research.weights.representations.grouped_product import Groups, multiply_groups
from research.weights.representations.leaf import Leaf
from research.weights.representations.plain_array import dot, input_gradient

Array = jax.Array


class QuantizedMatrix(Leaf):
    """A matrix in codes. It has no gradient, and lets that of its inputs through.

    A subclass says how its arrays lie and what they stand for; products, rows and
    transposes follow here. It has `flipped` as a static field.

    Attributes:
      flipped: output axes come first in `stored_shape`, or else input axes.
    """

    flipped: bool

    @property
    @abc.abstractmethod
    def form(self) -> str:
        """The name of its codes, such as `nf4`."""

    @property
    @abc.abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of `decode`: `[*stack, *out, *in]` if `flipped`, or in first."""

    @property
    @abc.abstractmethod
    def stack(self) -> int:
        """The number of stacking axes."""

    @property
    def lead(self) -> int:
        """The number of axes behind the stack that make the first end of a matrix."""
        return 1

    @abc.abstractmethod
    def decode(self, dtype: Any) -> Array:
        """The matrix as one array of `stored_shape`, rounded to `dtype` once."""

    @abc.abstractmethod
    def decode_rows(self, ids: Array, dtype: Any) -> Array:
        """`decode(dtype)[ids]` of one matrix of two axes; only these rows are made."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored_shape[i] for i in self._order)

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        return _product(x, self, n_in, dtype)

    def contract_groups(self, x: Array, groups: Groups, dtype: Any) -> Array:
        return _grouped_product(x, self, groups, dtype)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        if self.flipped:
            return self.materialize()[ids].astype(dtype)
        return self.decode_rows(ids, dtype)

    def transpose(self) -> Self:
        return dataclasses.replace(self, flipped=not self.flipped)

    def materialize(self) -> Array:
        """In float32, which holds every value that codes stand for."""
        return jnp.transpose(self.decode(jnp.float32), self._order)

    @property
    def _order(self) -> tuple[int, ...]:
        """The stored axes in the order stack, inputs, outputs."""
        first, last = self.stack, len(self.stored_shape)
        middle = first + self.lead if self.flipped else first
        return (*range(first), *range(middle, last), *range(first, middle))


def is_quantizable(spec: Spec) -> bool:
    """Whether codes suit the parameter: a matrix of a layer, a head, a table of ids.

    Routers are small and decide much, and a table of positions is small.
    """
    return spec.n_in > 0 and not {"choices", "positions"} & set(spec.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, w: QuantizedMatrix, n_in: int, dtype: Any) -> Array:
    return dot(x, w.decode(x.dtype), n_in, w.flipped, dtype)


def _product_forward(x, w, n_in, dtype):
    # Not `_product`: a remat policy must see the product to keep it.
    y = dot(x, w.decode(x.dtype), n_in, w.flipped, dtype)
    return y, (w, jnp.zeros(0, x.dtype))


def _product_backward(n_in, dtype, kept, d_y):
    w, like = kept
    d_y = d_y.astype(like.dtype)
    return input_gradient(d_y, w.decode(like.dtype), n_in, w.flipped), None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_product(x: Array, w: QuantizedMatrix, groups: Groups, dtype: Any) -> Array:
    return multiply_groups(x, w.decode(x.dtype), groups, w.flipped, dtype)


def _grouped_forward(x, w, groups, dtype):
    y = multiply_groups(x, w.decode(x.dtype), groups, w.flipped, dtype)
    return y, (w, groups, jnp.zeros(0, x.dtype))


def _grouped_backward(dtype, kept, d_y):
    w, groups, like = kept
    d_y, whole = d_y.astype(like.dtype), w.decode(like.dtype)
    return multiply_groups(d_y, whole, groups, not w.flipped, like.dtype), None, None


_grouped_product.defvjp(_grouped_forward, _grouped_backward)
