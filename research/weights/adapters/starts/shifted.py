"""LoRA that starts at a part of the weight itself: what PiSSA and OLoRA share.

Both take factors A0, B0 from the weight W, and train A, B from there over W - s A0 B0.
Here W stays as it is, and the adapter is s (A B - A0 B0): the same function, without
the rounding of a changed W. So runs of every kind share a base, and an export is an
ordinary adapter of the original model with twice the rank.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.weights.adapters.adapter_kind import Factors
from research.weights.adapters.lora import LoRA
from research.weights.contraction import materialize
from research.weights.over_stack import over_stack
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank

Array = jax.Array


class ShiftedLoRA(LoRA):
    """Factors `a` and `b`, and their start in `a0` and `b0`, which does not change."""

    decomposes = True

    @abc.abstractmethod
    def take(self, weight: Array, rank: int, scale: float) -> tuple[Array, Array]:
        """The start `[in, rank]` and `[rank, out]` of a weight `[in, out]`, float32."""

    def rank_fault(self, spec: Spec, rank: int) -> str:
        return self.new_rank_fault(spec, rank)

    def matrix_specs(self, spec: Spec, rank: int) -> dict[str, Spec]:
        own = super().matrix_specs(spec, rank)
        fixed = {f"{x}0": dataclasses.replace(own[x], fixed=True) for x in own}
        return own | fixed

    def init_matrix(
        self, key: Array, specs: Mapping[str, Spec], base: Matrix | None, scale: float
    ) -> Factors:
        a, b = specs["a"], specs["b"]
        if base is None:
            raise UserError(f"adapters of kind {self.name!r} start from the weights")
        (inputs, rank), outputs = a.as_matrix.shape[-2:], b.as_matrix.shape[-1]

        def one(weight: Matrix) -> tuple[Array, Array]:
            whole = materialize(weight).astype(jnp.float32)
            return self.take(whole.reshape(inputs, outputs), rank, scale)

        left, right = over_stack(one, a.stacked)(base)
        left, right = left.reshape(a.shape), right.reshape(b.shape)
        return {"a": left, "b": right, "a0": left, "b0": right}

    def attach_matrix(
        self,
        base: Matrix,
        factors: Factors,
        scale: Array,
        key: Array | None,
        rate: Array | None,
    ) -> Leaf:
        a, b = factors["a"], factors["b"]
        a0, b0 = jax.lax.stop_gradient((factors["a0"], -factors["b0"]))
        if key is None:
            a, b = jnp.concatenate([a, a0], -1), jnp.concatenate([b, b0], scale.ndim)
            return LowRank(base, a, b, scale)
        # As in PEFT, whose changed base has no dropout.
        return LowRank(LowRank(base, a0, b0, scale), a, b, scale, key, rate)

    def off_matrix(self, factors: Factors) -> Factors:
        return factors | {"a": factors["a0"], "b": factors["b0"]}

    def update_rank(self, factors: Mapping[str, Any]) -> int:
        return 2 * self.rank(factors)
