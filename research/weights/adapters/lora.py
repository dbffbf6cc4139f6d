"""LoRA as functions from parameters to parameters.

Hu et al. 2021, arXiv:2106.09685: a frozen matrix W is used as W + (alpha / rank) A B
with A `[*in, rank]` random and B `[rank, *out]` zero, so training starts at the base
model exactly. Nothing here computes a forward pass:

    adapters = init(key, specs, config)           # float32 factors, small
    params = adapt(base, adapters, config)        # leaves swapped for LowRank
    params = merge(base, adapters, config)        # or plain arrays, for deployment

Models that multiply through `contract` take `adapt`ed parameters as they are, and no
full-size gradient is ever formed. For any other function of parameters there is
`lift`, which merges inside (`lifting.py`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.weights import parameter_paths
from research.weights.adapters import lifting
from research.weights.adapters.adapter_kind import AdapterKind, Factors
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank

Array = jax.Array


class LoRA(AdapterKind):
    """Factors `a` and `b` of a low-rank update. Zero factors are its no-op state."""

    name = "lora"

    def new_rank_fault(self, spec: Spec, rank: int) -> str:
        inputs, outputs = spec.as_matrix.shape[-2:]
        if rank <= min(inputs, outputs):
            return ""
        return (
            f"its lora.rank is {rank}, and no update of a matrix [{inputs}, {outputs}] "
            f"has a rank above {min(inputs, outputs)}: lower config.lora.rank, or the "
            "rank of this matrix with config.lora.rank_pattern"
        )

    def matrix_specs(self, spec: Spec, rank: int) -> dict[str, Spec]:
        split = spec.stacked + spec.n_in
        stack, stack_axes = spec.shape[: spec.stacked], spec.axes[: spec.stacked]
        a = dataclasses.replace(
            spec,
            shape=(*spec.shape[:split], rank),
            axes=(*spec.axes[:split], "rank"),
        )
        b = dataclasses.replace(
            spec,
            shape=(*stack, rank, *spec.shape[split:]),
            axes=(*stack_axes, "rank", *spec.axes[split:]),
            n_in=1,
        )
        return {"a": a, "b": b}

    def init_matrix(
        self, key: Array, specs: Mapping[str, Spec], base: Matrix | None, scale: float
    ) -> Factors:
        """A as `draw` gives it, and B zero; of a table A zero and B normal, as in PEFT.

        A table gives rows away: one with small factors in both would hardly train.
        """
        a = specs["a"]
        if a.is_table:
            drawn = jax.random.normal(key, specs["b"].shape, jnp.float32)
            return {"a": jnp.zeros(a.shape, jnp.float32), "b": drawn}
        # Drawn as rows, which gives the same numbers: a CPU takes seconds to compile
        # the random bits of three axes. A mesh splits only the first input axis of A
        # (`mesh.RULES`), which is the first of a row, so no device has all of A.
        rows = (*a.shape[: a.stacked], math.prod(a.shape[a.stacked :]))
        b = jnp.zeros(specs["b"].shape, jnp.float32)
        return {"a": self.draw(key, rows, a).reshape(a.shape), "b": b}

    def draw(self, key: Array, shape: tuple[int, ...], a: Spec) -> Array:
        """Values of the factor `a`, uniform in +-1/sqrt(fan_in), as PEFT draws them."""
        bound = math.prod(a.in_shape) ** -0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    def attach_matrix(
        self,
        base: Matrix,
        factors: Factors,
        scale: Array,
        key: Array | None,
        rate: Array | None,
    ) -> Leaf:
        return LowRank(base, factors["a"], factors["b"], scale, key, rate)

    def rank(self, factors: Mapping[str, Any]) -> int:
        return factors["a"].shape[-1]

    def stack_axes(self, base: Any, factors: Mapping[str, Any]) -> int:
        # `a` is `[*stack, *in, rank]` and `b` `[*stack, rank, *out]`: together they
        # have the axes of the base, two for the rank, and the stack once more.
        axes = len(factors["a"].shape) + len(factors["b"].shape)
        return axes - 2 - len(base.shape)


KIND = LoRA()

adapter_specs = KIND.specs
init = KIND.init
adapt = KIND.adapt
merge = KIND.merge
unmerge = KIND.unmerge
count = parameter_paths.count
lift = lifting.lift
specs_of = lifting.specs_of
