"""The layers of a decoder block. Only `Linear` multiplies by a weight matrix."""

import functools

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
    """Float32 values: normal with `spec.std`, or ones if that is 0."""
    if spec.std == 0.0:
        return Parameter(jnp.ones(spec.shape, jnp.float32), spec=spec)
    value = spec.std * jax.random.normal(rngs.params(), spec.shape, jnp.float32)
    return Parameter(value, spec=spec)


class Linear(nnx.Module):
    """`x @ kernel` over `spec.n_in` axes, without a bias."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        self.kernel = make_parameter(spec, rngs)
        self.n_in = spec.n_in

    @property
    def matrix(self) -> Matrix:
        return self.kernel.get_value()

    def __call__(self, x: Array) -> Array:
        return contract(x, self.matrix, self.n_in)


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
    """Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; computed in float32."""

    def __init__(self, spec: Spec, eps: float, rngs: nnx.Rngs):
        self.scale = make_parameter(spec, rngs)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return _normalized(x, self.scale.get_value(), self.eps)


# These functions are cheap, and their float32 intermediates are large: the backward
# pass computes them again instead of keeping them for every layer.
_recomputed = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.nothing_saveable,
    prevent_cse=False,
)


@functools.partial(_recomputed, static_argnums=2)
def _normalized(x: Array, scale: Array, eps: float) -> Array:
    x_32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x_32 * x_32, axis=-1, keepdims=True)
    normed = x_32 * jax.lax.rsqrt(mean_square + eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (normed * scale).astype(x.dtype)


@_recomputed
def gated(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, computed in float32."""
    gate_32, up_32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(gate_32) * up_32).astype(up.dtype)
