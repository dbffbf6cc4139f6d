"""A mixture of experts in the place of a block's MLP: the router and the experts.

Shazeer et al. 2017, arXiv:1701.06538, section 2, with the gated MLPs of Mixtral (Jiang
et al. 2024, arXiv:2401.04088, section 2.1). Letters of shapes: see `attention.py` and
`expert_dispatch.py`; L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.models.architecture import Architecture
from research.models.parts.layers import Linear, gated, make_parameter, vector
from research.weights.contraction import contract_groups
from research.weights.parameter_spec import Spec
from research.weights.representations.grouped_product import Groups

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertLoad:
    """How the router has spread the tokens of a batch; padding does not count.

    Attributes:
      assigned: float32 `[E]`, or `[L, E]` for all layers: tokens of each expert.
      probability: likewise, sums over tokens of the router's probabilities.
      tokens: float32, or `[L]`, those that were routed.
    """

    assigned: Array
    probability: Array
    tokens: Array

    def balance_loss(self) -> Array:
        """E * sum_e f_e P_e over all layers at once; C if all experts are used alike.

        f_e is the number of assignments to expert e divided by that of tokens, and P_e
        the mean probability of e (Fedus et al. 2021, arXiv:2101.03961, eq. 4, with C
        experts for each token as in transformers' `load_balancing_loss_func`).
        """
        count = jnp.maximum(jnp.sum(self.tokens), 1.0)
        over = tuple(range(self.assigned.ndim - 1))
        shares = jnp.sum(self.assigned, axis=over) / count
        probability = jnp.sum(self.probability, axis=over) / count
        return self.assigned.shape[-1] * jnp.sum(shares * probability)


class Router(Linear):
    """Chooses the experts of each token, in float32."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        shape = a.embed, a.experts.count
        spec = Spec(shape, ("embed", "choices"), std=a.embed**-0.5)
        super().__init__(spec, rngs, "router" in a.biases)
        self.experts = a.experts

    def __call__(
        self, x_BTD: Array, real_BT: Array | None
    ) -> tuple[Array, Array, ExpertLoad]:
        """The chosen experts `[B, T, C]`, their shares, and the load.

        Tokens that are not `real_BT` choose expert E, which does not exist. None: all
        are real.
        """
        logits_BTE = self._logits(x_BTD)
        probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        chosen = self.experts.chosen
        if self.experts.renormalized:
            # As if the softmax had only the chosen ones.
            best_BTC, chosen_BTC = jax.lax.top_k(logits_BTE, chosen)
            shares_BTC = jax.nn.softmax(best_BTC, axis=-1)
        else:
            shares_BTC, chosen_BTC = jax.lax.top_k(probability_BTE, chosen)
        count = self.experts.count
        if real_BT is not None:
            chosen_BTC = jnp.where(real_BT[..., None], chosen_BTC, count)
            probability_BTE = jnp.where(real_BT[..., None], probability_BTE, 0.0)
        load = ExpertLoad(
            assigned=jnp.sum(jax.nn.one_hot(chosen_BTC, count), axis=(0, 1, 2)),
            probability=jnp.sum(probability_BTE, axis=(0, 1)),
            tokens=jnp.sum(chosen_BTC[..., 0] < count, dtype=jnp.float32),
        )
        return chosen_BTC, shares_BTC, load

    def _logits(self, x_BTD: Array) -> Array:
        # The backward pass casts the hidden states again, and keeps no float32 copy.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def logits(x_BTD: Array) -> Array:
            return Linear.__call__(self, x_BTD.astype(jnp.float32))

        return logits(x_BTD)


class ExpertLinear(nnx.Module):
    """A matrix, and perhaps a bias, for each expert."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs, bias: bool):
        self.kernel = make_parameter(spec, rngs)
        if bias:
            # Short, so every device has that of the whole residual stream.
            out = "norm" if spec.axes[2] == "expert_embed" else spec.axes[2]
            shape = spec.shape[0], spec.shape[2]
            like = vector(shape, ("expert", out), fill=0.0)
            self.bias = make_parameter(dataclasses.replace(like, stacked=1), rngs)
        self.has_bias = bias

    @property
    def weights(self) -> tuple[Any, Any]:
        bias = self.bias.get_value() if self.has_bias else None
        return self.kernel.get_value(), bias


class ExpertMLP(nnx.Module):
    """The gated MLPs of all experts, their matrices stacked over experts."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        count = a.experts.count
        up = Spec(
            (count, a.embed, a.mlp), ("expert", "expert_embed", "expert_mlp"),
            stacked=1, std=a.embed**-0.5,
        )  # fmt: skip
        down = Spec(
            (count, a.mlp, a.embed), ("expert", "expert_mlp", "expert_embed"),
            stacked=1, std=(a.mlp * 2 * a.layers) ** -0.5,
        )  # fmt: skip
        bias = "experts" in a.biases
        self.gate = ExpertLinear(up, rngs, bias)
        self.up = ExpertLinear(up, rngs, bias)
        self.down = ExpertLinear(down, rngs, bias)
        self.activation, self.count = a.activation, count

    def __call__(
        self, x_BTD: Array, chosen_BTC: Array, shares_BTC: Array, mix: Callable
    ) -> Array:
        """`mix` is `expert_dispatch.mix_experts`, or its like on a mesh."""
        weights = {name: getattr(self, name).weights for name in ("gate", "up", "down")}
        compute = functools.partial(compute_experts, self.activation)
        return mix(compute, weights, x_BTD, chosen_BTC, shares_BTC, experts=self.count)


def compute_experts(
    activation: str,
    weights: dict[str, tuple[Any, Any]],
    rows_MD: Array,
    shares_M: Array,
    groups: Groups,
) -> Array:
    """The MLP of each row's expert, times the row's share; zeros without an expert.

    The last matrix reads its input times the share, so that the gradient of a share
    does not need the outputs.
    """
    shares_M1 = shares_M[:, None]

    def linear(name: str, rows: Array, times: Array | float = 1.0) -> Array:
        kernel, bias = weights[name]
        made = contract_groups(rows, kernel, groups)
        if bias is None:
            return made
        own = bias.at[groups.owners].get(mode="fill", fill_value=0)
        return made + (own * times).astype(made.dtype)

    gate, up = linear("gate", rows_MD), linear("up", rows_MD)
    return linear("down", gated(gate, up, activation, shares_M1), shares_M1)
