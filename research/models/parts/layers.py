"""The layers of a decoder block. Only `Linear` multiplies by a weight matrix."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from research.weights.contraction import contract, lookup
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

Array = jax.Array


class Parameter(nnx.Param):
    """A parameter that carries its `Spec` (shape, axis names) as metadata."""


def make_parameter(spec: Spec, rngs: nnx.Rngs) -> Parameter:
    """Float32 values: normal with `spec.std`, or `spec.fill` if that is 0."""
    if spec.std == 0.0:
        return Parameter(jnp.full(spec.shape, spec.fill, jnp.float32), spec=spec)
    value = spec.std * jax.random.normal(rngs.params(), spec.shape, jnp.float32)
    return Parameter(value, spec=spec)


class Linear(nnx.Module):
    """`x @ kernel` over `spec.n_in` axes, plus a bias if it has one."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs, bias: bool = False):
        self.kernel = make_parameter(spec, rngs)
        self.n_in = spec.n_in
        self.has_bias = bias
        if bias:
            # A bias is short, so every device has that of the whole residual stream.
            axes = ("norm" if x == "embed" else x for x in spec.axes[spec.n_in :])
            shape = spec.shape[spec.n_in :]
            self.bias = make_parameter(vector(shape, tuple(axes), fill=0.0), rngs)

    @property
    def matrix(self) -> Matrix:
        return self.kernel.get_value()

    def __call__(self, x: Array) -> Array:
        y = contract(x, self.matrix, self.n_in)
        return (
            y + _over(self.bias.get_value(), y).astype(y.dtype) if self.has_bias else y
        )


def vector(shape: tuple[int, ...], axes: tuple[str, ...], fill: float) -> Spec:
    """The spec of a parameter that is no matrix: a bias, or the scale of a norm."""
    return Spec(shape, axes, n_in=0, std=0.0, fill=fill)


def _over(vector: Array, x: Array) -> Array:
    """`vector` with as many axes as `x`, whose last ones it has."""
    return jnp.expand_dims(vector, range(x.ndim - vector.ndim))


class Embedding(nnx.Module):
    """Rows of a `[V, D]` table."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        self.table = make_parameter(spec, rngs)

    @property
    def matrix(self) -> Matrix:
        return self.table.get_value()

    def __call__(self, ids: Array, dtype: jnp.dtype) -> Array:
        return lookup(self.matrix, ids, dtype)


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; computed in float32.

    `shape` are the axes over which it takes the mean. The scale is stored without its
    `shift`: near zero, bfloat16 is finer than near one.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        eps: float,
        rngs: nnx.Rngs,
        shift: float = 0.0,
    ):
        self.scale = make_parameter(vector(shape, axes, fill=1.0 - shift), rngs)
        self.eps, self.shift = eps, shift

    def __call__(self, x: Array) -> Array:
        return _normalized(x, self.scale.get_value(), self.eps, self.shift)


class LayerNorm(nnx.Module):
    """Ba et al. 2016, arXiv:1607.06450, eq. 4; computed in float32."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        eps: float,
        rngs: nnx.Rngs,
    ):
        self.scale = make_parameter(vector(shape, axes, fill=1.0), rngs)
        self.bias = make_parameter(vector(shape, axes, fill=0.0), rngs)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        scale, bias = self.scale.get_value(), self.bias.get_value()
        return _standardized(x, scale, bias, self.eps)


# These functions are cheap, and their float32 intermediates are large: the backward
# pass computes them again instead of keeping them for every layer.
_recomputed = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.nothing_saveable,
    prevent_cse=False,
)
# The same for functions that make the inputs of matrix products and multiply them: an
# input is as wide as what it is made of, and a trained matrix or adapter needs it for
# its gradient. The products themselves are not computed again.
recomputing_inputs = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    prevent_cse=False,
)


@functools.partial(_recomputed, static_argnums=(2, 3))
def _normalized(x: Array, scale: Array, eps: float, shift: float) -> Array:
    x_32 = x.astype(jnp.float32)
    mean_square = _mean(x_32 * x_32, scale.ndim)
    normed = x_32 * jax.lax.rsqrt(mean_square + eps)
    scale = _over(scale.astype(jnp.float32), x)
    scale = scale + shift if shift else scale
    return (normed * scale).astype(x.dtype)


@functools.partial(_recomputed, static_argnums=3)
def _standardized(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    x_32 = x.astype(jnp.float32)
    centred = x_32 - _mean(x_32, scale.ndim)
    normed = centred * jax.lax.rsqrt(_mean(centred * centred, scale.ndim) + eps)
    scale, bias = (_over(y.astype(jnp.float32), x) for y in (scale, bias))
    return (normed * scale + bias).astype(x.dtype)


def _mean(x: Array, axes: int) -> Array:
    """The mean over the last `axes` axes, which stay with length 1."""
    return jnp.mean(x, axis=tuple(range(-axes, 0)), keepdims=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


CLAMPED = "clamped_swiglu"
# The numbers with which GPT-OSS was trained (https://github.com/openai/gpt-oss).
GATE_LIMIT, GATE_SLOPE = 7.0, 1.702


@functools.partial(_recomputed, static_argnums=2)
def gated(gate: Array, up: Array, activation: str, times: Array | float = 1.0) -> Array:
    """`activation(gate) * up * times`, computed in float32.

    `CLAMPED` bounds gate and up, and has an approximation of GELU and `up + 1`.
    """
    gate_32, up_32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    if activation == CLAMPED:
        gate_32 = jnp.minimum(gate_32, GATE_LIMIT)
        up_32 = jnp.clip(up_32, -GATE_LIMIT, GATE_LIMIT)
        shut = jax.nn.sigmoid(GATE_SLOPE * gate_32)
        return (gate_32 * shut * (up_32 + 1.0) * times).astype(up.dtype)
    return (ACTIVATIONS[activation](gate_32) * up_32 * times).astype(up.dtype)


@functools.partial(_recomputed, static_argnums=1)
def activated(up: Array, activation: str) -> Array:
    """`activation(up)`, computed in float32."""
    return ACTIVATIONS[activation](up.astype(jnp.float32)).astype(up.dtype)
