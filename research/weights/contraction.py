"""A weight is a value: an array, or a small pytree that knows how to be contracted.

This is the bottom of the code base. A model multiplies only through `contract`,
`lookup` and `transpose`, so a transform such as LoRA (`lora.py`) changes what a
model computes by swapping leaves of its parameters, and the model never learns of
it. `jit`, `scan`, `remat`, `vmap` and sharding follow because leaves are pytrees.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """`base + scale * a @ b`, kept in factors so that no full matrix is formed.

    With dropout, `key` and `rate` are not None and the adapter's input is dropped at
    `rate` (Hu et al. 2021, arXiv:2106.09685, section 4.1 and its reference code).

    Attributes:
      base: the frozen weight, shape `[*stack, *in, *out]`.
      a: `[*stack, *in, rank]`.
      b: `[*stack, rank, *out]`.
      scale: `[*stack]`, alpha / rank.
      key: `[*stack]` typed PRNG keys, or None for no dropout.
      rate: `[*stack]`, share of adapter inputs dropped. An array, since adapters that
        are trained together differ in it.
    """

    base: "Matrix"
    a: Array
    b: Array
    scale: Array
    key: Array | None = None
    rate: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A two-axis matrix used from its other side, without a copy in that layout.

    Attributes:
      of: `[out, in]`, such as an embedding table used as vocabulary head.
    """

    of: "Matrix"


Matrix = Array | LowRank | Transposed


def contract(x: Array, w: Matrix, n_in: int = 1) -> Array:
    """Sum the last `n_in` axes of `x` with the first `n_in` of `w`, in `x.dtype`.

    Args:
      x: `[*batch, *in]`.
      w: `[*in, *out]`, an array or a `LowRank` without stacking axes.
      n_in: the number of summed axes.

    Returns:
      `[*batch, *out]` in the dtype of `x`: weights are cast, never activations.
    """
    if isinstance(w, LowRank):
        low = contract(_dropout(x, w), w.a, n_in) * w.scale.astype(x.dtype)
        return contract(x, w.base, n_in) + contract(low, w.b)
    if isinstance(w, Transposed):
        return _multiply(x, w.of, 1, True)
    return _multiply(x, w, n_in, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _multiply(x: Array, w: Array, n_in: int, flipped: bool) -> Array:
    """`x @ w`; `flipped`: the output axes of `w` come first.

    The derivative rule is the ordinary one. Written out, the gradient of a weight
    comes in the weight's own order of axes: left to itself JAX asks for it
    transposed, which on CPU costs five times as much in bfloat16.
    """
    return _dot(x, w, n_in, flipped)


def _dot(x: Array, w: Array, n_in: int, flipped: bool) -> Array:
    rank, first = len(w.shape), x.ndim - n_in
    into = range(rank - n_in, rank) if flipped else range(n_in)
    summed = (tuple(range(first, x.ndim)), tuple(into))
    return jax.lax.dot_general(x, w.astype(x.dtype), (summed, ((), ())))


def _multiply_forward(x, w, n_in, flipped):
    # Not `_multiply`: a remat policy must see the product to keep it.
    y = _dot(x.value, w.value, n_in, flipped)
    # A frozen weight gets no gradient, and needs no input kept for it.
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    return y, (*kept, jnp.zeros(0, w.value.dtype))


def _multiply_backward(n_in, flipped, kept, d_y):
    x, w, like = kept
    d_x = d_w = None
    if w is not None:
        n_out = len(w.shape) - n_in
        out = range(n_out) if flipped else range(n_in, len(w.shape))
        summed = (tuple(range(d_y.ndim - n_out, d_y.ndim)), tuple(out))
        d_x = jax.lax.dot_general(d_y, w.astype(d_y.dtype), (summed, ((), ())))
    if x is not None:
        batch = tuple(range(x.ndim - n_in))
        pair = (d_y, x) if flipped else (x, d_y)
        d_w = jax.lax.dot_general(*pair, ((batch, batch), ((), ()))).astype(like.dtype)
    return d_x, d_w


_multiply.defvjp(_multiply_forward, _multiply_backward, symbolic_zeros=True)


def lookup(w: Matrix, ids: Array, dtype: jnp.dtype) -> Array:
    """Rows `ids` of a `[vocabulary, *out]` matrix, cast to `dtype`.

    Equal to contracting one-hot rows with `w`. LoRA dropout does not apply: a
    one-hot input has nothing to drop but whole tokens.
    """
    if isinstance(w, LowRank):
        low = lookup(w.a, ids, dtype) * w.scale.astype(dtype)
        return lookup(w.base, ids, dtype) + contract(low, w.b)
    return jnp.take(w, ids, axis=0).astype(dtype)


def transpose(w: Matrix) -> Matrix:
    """A two-axis matrix with input and output swapped (a tied vocabulary head)."""
    if isinstance(w, LowRank):
        return dataclasses.replace(
            w, base=transpose(w.base), a=transpose(w.b), b=transpose(w.a)
        )
    if isinstance(w, Transposed):
        return w.of
    return Transposed(w)


def materialize(w: Matrix) -> Array:
    """`w` as one array in the base's dtype; the sum is formed in float32.

    Leading axes that `w.scale` has are treated as stacked copies.
    """
    if isinstance(w, Transposed):
        return materialize(w.of).T
    if not isinstance(w, LowRank):
        return w
    base = materialize(w.base)
    delta = product(materialize(w.a), materialize(w.b), w.scale)
    return (base.astype(jnp.float32) + delta).astype(base.dtype)


def product(a: Array, b: Array, scale: Array) -> Array:
    """`scale * a @ b` in float32 for factors with `scale.ndim` stacking axes."""

    def one(a: Array, b: Array, scale: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.tensordot(a, b, axes=1, precision="highest") * scale

    for _ in range(scale.ndim):
        one = jax.vmap(one)
    return one(a, b, scale)


def _dropout(x: Array, w: LowRank) -> Array:
    if w.key is None:
        return x
    share = 1.0 - jnp.asarray(w.rate, jnp.float32)
    keep = jax.random.bernoulli(w.key, share, x.shape)
    return jnp.where(keep, x / share.astype(x.dtype), jnp.zeros_like(x))
