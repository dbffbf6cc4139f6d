"""DoRA: LoRA that trains the lengths of weights apart from their directions.

Liu et al. 2024, arXiv:2402.09353: the weights of an output are m (W + s A B) / n, where
n is the length of the column W + s A B. It counts as a constant in the gradient
(section 4.3), and m starts at it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.weights.adapters.adapter_kind import Factors
from research.weights.adapters.lora import LoRA
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank
from research.weights.representations.weight_decomposed import (
    NormedWeight,
    WeightDecomposed,
    gain_of,
    output_norms,
)

Array = jax.Array


class DoRA(LoRA):
    """Factors `a` and `b`, and the lengths `magnitude`, `[*stack, *out]`.

    A length of zero stands for an output that no adapter changes.
    """

    name = "dora"
    is_exact = False  # Two programs may round a length in two ways.
    has_gains = True

    def matrix_specs(self, spec: Spec, rank: int) -> dict[str, Spec]:
        split = spec.stacked + spec.n_in
        magnitude = dataclasses.replace(
            spec,
            shape=(*spec.shape[: spec.stacked], *spec.shape[split:]),
            axes=(*spec.axes[: spec.stacked], *spec.axes[split:]),
            n_in=0,
        )
        return super().matrix_specs(spec, rank) | {"magnitude": magnitude}

    def init_matrix(
        self, key: Array, specs: Mapping[str, Spec], base: Matrix | None, scale: float
    ) -> Factors:
        if base is None:
            raise UserError("adapters of kind 'dora' start from the weights")
        start = super().init_matrix(key, specs, base, scale)
        return start | {"magnitude": self._norms(base, start)}

    def measure_matrix(
        self, base: Matrix, factors: Factors, scale: Array
    ) -> Matrix | Any:
        return NormedWeight(base, self._norms(base, factors, scale))

    def attach_matrix(
        self,
        base: Matrix | NormedWeight,
        factors: Factors,
        scale: Array,
        key: Array | None,
        rate: Array | None,
    ) -> Leaf:
        if not isinstance(base, NormedWeight):
            base = self.measure_matrix(base, factors, scale)
        inner = super().attach_matrix(base.base, factors, scale, key, rate)
        return WeightDecomposed(inner, gain_of(factors["magnitude"], base.norm))

    def _norms(
        self, base: Matrix, factors: Factors, scale: Array | None = None
    ) -> Array:
        if scale is None:  # Any will do where the product of factors is zero.
            stack = base.shape[: self.stack_axes(base, factors)]
            scale = jnp.ones(stack, jnp.float32)
        fixed = jax.lax.stop_gradient((factors["a"], factors["b"]))
        return output_norms(LowRank(base, *fixed, scale))


KIND = DoRA()
