"""Weights as plain arrays: the product and its derivative rule."""

import functools

import jax
import jax.numpy as jnp

from research.weights.parameter_spec import Spec

Array = jax.Array


class PlainArrays:
    """The `BaseFormat` that keeps frozen weights as arrays of `config.model.dtype`."""

    def specs(self, spec: Spec) -> Spec:
        return spec

    def store(self, weight: Array, spec: Spec) -> Array:
        return weight


FORMAT = PlainArrays()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def multiply(x: Array, w: Array, n_in: int, flipped: bool, dtype: jnp.dtype) -> Array:
    """`x @ w` over `n_in` axes, accumulated and returned in `dtype`.

    Args:
      x: `[*batch, *in]`.
      w: `[*in, *out]`, or `[*out, *in]` where `flipped`. It is cast to `x.dtype`.
      n_in: number of summed axes.
      flipped: the output axes of `w` come first.
      dtype: of the result.

    The derivative rule is the ordinary one. It is written out so that the gradient of
    a weight comes in the weight's own order of axes: JAX would ask for it transposed,
    which on a CPU costs five times as much in bfloat16.
    """
    return dot(x, w, n_in, flipped, dtype)


def dot(x: Array, w: Array, n_in: int, flipped: bool, dtype: jnp.dtype) -> Array:
    """As `multiply`, without its derivative rule."""
    rank, first = len(w.shape), x.ndim - n_in
    into = range(rank - n_in, rank) if flipped else range(n_in)
    summed = (tuple(range(first, x.ndim)), tuple(into))
    return jax.lax.dot_general(
        x, w.astype(x.dtype), (summed, ((), ())), preferred_element_type=dtype
    )


def input_gradient(d_y: Array, w: Array, n_in: int, flipped: bool) -> Array:
    """The gradient of the inputs of `dot` from that of its result, in its dtype."""
    n_out = len(w.shape) - n_in
    out = range(n_out) if flipped else range(n_in, len(w.shape))
    summed = (tuple(range(d_y.ndim - n_out, d_y.ndim)), tuple(out))
    return jax.lax.dot_general(d_y, w.astype(d_y.dtype), (summed, ((), ())))


def _forward(x, w, n_in, flipped, dtype):
    # Not `multiply`: a remat policy must see the product to keep it.
    y = dot(x.value, w.value, n_in, flipped, dtype)
    # A frozen weight gets no gradient, so its input is not kept.
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    like = jnp.zeros(0, x.value.dtype), jnp.zeros(0, w.value.dtype)
    return y, (*kept, *like)


def _backward(n_in, flipped, dtype, kept, d_y):
    x, w, like_x, like_w = kept
    # A wide result does not make the products of its gradient wide.
    d_y = d_y.astype(like_x.dtype)
    d_x = d_w = None
    if w is not None:
        d_x = input_gradient(d_y, w, n_in, flipped)
    if x is not None:
        # With the barrier, inputs that are made again are made once, in their own order
        # of axes. XLA's CPU compiler would otherwise make each value where this product
        # reads it, across that order. Other compilers choose for themselves.
        x = jax.lax.platform_dependent(
            x, cpu=jax.lax.optimization_barrier, default=lambda x: x
        )
        batch = tuple(range(x.ndim - n_in))
        pair = (d_y, x) if flipped else (x, d_y)
        d_w = jax.lax.dot_general(*pair, ((batch, batch), ((), ())))
        d_w = d_w.astype(like_w.dtype)
    return d_x, d_w


multiply.defvjp(_forward, _backward, symbolic_zeros=True)
