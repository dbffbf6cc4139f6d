"""The one Block of all families: attention and MLP, as the switches say.

Axis letters: see `attention.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.models.architecture import Architecture
from research.models.attention import ScoreRule
from research.models.parts.experts import ExpertLoad, ExpertMLP, Router
from research.models.parts.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    activated,
    gated,
    make_parameter,
    recomputing_inputs,
    vector,
)
from research.models.parts.rotary import distinct, rotate
from research.weights.parameter_spec import Spec

Array = jax.Array


def make_norm(
    a: Architecture, shape: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs
) -> RMSNorm | LayerNorm:
    if a.norm == "layer":
        return LayerNorm(shape, axes, a.norm_eps, rngs)
    return RMSNorm(shape, axes, a.norm_eps, rngs, a.norm_shift)


def unchanged(x: Array) -> Array:
    """Stands in the place of a norm that a family does not have."""
    return x


def _make_qk_norm(
    a: Architecture, heads: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs
) -> Callable[[Array], Array]:
    """The norm of queries or keys: of all heads at once, or one scale for each head."""
    if a.qk_norm == "none":
        return unchanged
    if a.qk_norm == "flat":
        return make_norm(a, heads, axes, rngs)
    return make_norm(a, heads[1:], ("norm",), rngs)


class Attention(nnx.Module):
    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        q, kv = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        queries, keys = (
            (a.embed, a.heads, a.head_dim),
            (a.embed, a.kv_heads, a.head_dim),
        )
        std, bias = a.embed**-0.5, "qkv" in a.biases
        self.query = Linear(Spec(queries, q, std=std), rngs, bias)
        self.key = Linear(Spec(keys, kv, std=std), rngs, bias)
        self.value = Linear(Spec(keys, kv, std=std), rngs, bias)
        out = Spec(
            (a.heads, a.head_dim, a.embed),
            ("heads", "head_dim", "embed"),
            n_in=2,
            std=(a.heads * a.head_dim * 2 * a.layers) ** -0.5,
        )
        self.output = Linear(out, rngs, "out" in a.biases)
        self.query_norm = _make_qk_norm(a, queries[1:], q[1:], rngs)
        self.key_norm = _make_qk_norm(a, keys[1:], kv[1:], rngs)
        self.has_sinks = a.attention_sinks
        if a.attention_sinks:
            self.sinks = make_parameter(vector((a.heads,), ("heads",), fill=0.0), rngs)
        # Kernels scale by 1 / sqrt(H).
        scale = a.attention_scale
        self.query_scale = 1.0 if scale is None else scale * a.head_dim**0.5

    def __call__(
        self,
        x_BTD: Array,
        norm: Callable[[Array], Array],
        rope: Any,
        attend: Callable[..., Any],
    ):
        @recomputing_inputs
        def products(x_BTD: Array) -> tuple[Array, ...]:
            x_BTD = norm(x_BTD)
            return self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)

        q_BTNH, k_BTKH, v_BTKH = products(x_BTD)
        q_BTNH = rotate(self.query_norm(q_BTNH), rope, self.query_scale)
        k_BTKH = rotate(self.key_norm(k_BTKH), rope)
        sinks_N = self.sinks.get_value() if self.has_sinks else None
        mixed_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, sinks_N)
        return self.output(mixed_BTNH), cache


class MLP(nnx.Module):
    """Two matrices, or three with a gate: Shazeer 2020, arXiv:2002.05202, section 2."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        up = Spec((a.embed, a.mlp), ("embed", "mlp"), std=a.embed**-0.5)
        down = Spec(
            (a.mlp, a.embed), ("mlp", "embed"), std=(a.mlp * 2 * a.layers) ** -0.5
        )
        bias = "mlp" in a.biases
        self.activation, self.is_gated = a.activation, a.gated_mlp
        if a.gated_mlp:
            self.gate = Linear(up, rngs, bias)
        self.up = Linear(up, rngs, bias)
        self.down = Linear(down, rngs, bias)

    def __call__(self, x_BTD: Array, norm: Callable[[Array], Array]) -> Array:
        @recomputing_inputs
        def into(x_BTD: Array) -> tuple[Array, ...]:
            x_BTD = norm(x_BTD)
            gate = (self.gate(x_BTD),) if self.is_gated else ()
            return (*gate, self.up(x_BTD))

        @recomputing_inputs
        def out(*made_BTF: Array) -> Array:
            combine = gated if self.is_gated else activated
            return self.down(combine(*made_BTF, self.activation))

        return out(*into(x_BTD))


class Block(nnx.Module):
    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        def norm(where: str):
            exists = a.norm_at in (where, "both")
            return make_norm(a, (a.embed,), ("norm",), rngs) if exists else unchanged

        self.attention_norm = norm("pre")
        self.attention = Attention(a, rngs)
        self.attention_out_norm = norm("post")
        self.mlp_norm = norm("pre")
        self.has_experts = a.experts is not None
        if self.has_experts:
            self.router = Router(a, rngs)
        self.mlp = ExpertMLP(a, rngs) if self.has_experts else MLP(a, rngs)
        self.mlp_out_norm = norm("post")
        self.is_parallel, self.residual_scale = a.parallel_residual, a.residual_scale

    def __call__(
        self,
        x_BTD: Array,
        rope: Any,
        attend: Callable[..., Any],
        mix: Callable[..., Array],
        real_BT: Array | None = None,
    ) -> tuple[Array, Any, ExpertLoad | None]:
        """The next hidden states, the layer's cache, and the load of its experts.

        Args:
          x_BTD: hidden states.
          rope: tables of the rotary embedding, or None.
          attend: `attend(q, k, v, sinks)` gives mixed values, and the layer's cache or
            None; sinks may be None.
          mix: as `Options.mix_experts`.
          real_BT: tokens that are no padding; None: all.
        """
        mixed_BTD, cache = self.attention(x_BTD, self.attention_norm, rope, attend)
        after_BTD = x_BTD + self._branch(self.attention_out_norm(mixed_BTD))
        read_BTD, load = x_BTD if self.is_parallel else after_BTD, None
        if self.has_experts:
            read_BTD = self.mlp_norm(read_BTD)
            chosen, shares, load = self.router(read_BTD, real_BT)
            made_BTD = self.mlp(read_BTD, chosen, shares, mix)
        else:
            made_BTD = self.mlp(read_BTD, self.mlp_norm)
        return after_BTD + self._branch(self.mlp_out_norm(made_BTD)), cache, load

    def _branch(self, x_BTD: Array) -> Array:
        return x_BTD if self.residual_scale == 1.0 else x_BTD * self.residual_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Differences between layers, by layer or of one; None where none differs.

    Attributes:
      rope: number of its rotary embedding among the distinct ones.
      windowed: whether it has the window.
    """

    rope: Array | None
    windowed: Array | None


def kinds_of_layers(a: Architecture) -> LayerKind:
    """Arrays `[L]`, which the scan over layers reads beside the parameters."""
    ropes, windowed = distinct(a.ropes), [window > 0 for window in a.windows]
    numbers = jnp.array([ropes.index(rope) for rope in a.ropes], jnp.int32)
    return LayerKind(
        rope=numbers if len(ropes) > 1 else None,
        windowed=jnp.array(windowed) if len({*windowed}) > 1 else None,
    )


def rule_of(
    a: Architecture, kind: LayerKind, sinks_N: Array | None
) -> tuple[ScoreRule, ...]:
    """The last argument of attention in a layer of this kind; none if it is plain."""
    window = max(a.windows)
    if not window and not a.attention_softcap and sinks_N is None:
        return ()
    return (ScoreRule(window, a.attention_softcap, kind.windowed, sinks_N),)
