"""VeRA: two vectors for each matrix, between random matrices that all of them share."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from research.config.knob_groups import LoRAConfig
from research.weights.adapters.adapter_kind import (
    AdapterKind,
    Adapters,
    Factors,
    Settings,
)
from research.weights.adapters.chosen_layers import only_layers
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank

Array = jax.Array
START = 0.1  # `lambda_d` starts here, as in PEFT and table 6 of the paper.


class VeRA(AdapterKind):
    """Kopiczko et al. 2024, arXiv:2310.11454, equation 2, as PEFT computes it.

    A frozen weight W is used as W + (A diag(d)) (B diag(b)), where `a0` (A, `[*in,
    rank]`) and `b0` (B, `[rank, *out]`) stay as they were drawn, and `lambda_d` (d,
    `[*stack, rank]`) and `lambda_b` (b, `[*stack, *out]`) are trained. The drawn
    matrices are the first rows of one A and the first columns of one B, whatever the
    layer. They follow from a fixed number, so that all runs of a model share them, and
    lie in a checkpoint once for all layers. There is no alpha.
    """

    name = "vera"

    def matrix_specs(self, spec: Spec, rank: int) -> dict[str, Spec]:
        split, first = spec.stacked + spec.n_in, spec.stacked
        stack, stack_axes = spec.shape[:first], spec.axes[:first]
        out, out_axes = spec.shape[split:], spec.axes[split:]
        in_axes = spec.axes[first:split]
        return {
            "a0": Spec(
                (*spec.in_shape, rank), (*in_axes, "rank"), spec.n_in, fixed=True
            ),
            "b0": Spec((rank, *out), ("rank", *out_axes), 1, fixed=True),
            "lambda_d": Spec((*stack, rank), (*stack_axes, "rank"), 0, first),
            "lambda_b": Spec((*stack, *out), (*stack_axes, *out_axes), 0, first),
        }

    def rank_fault(self, spec: Spec, rank: int) -> str:
        if not spec.is_table:
            return ""
        return (
            "vera has none for tables: drop it from config.lora.targets, or choose "
            "another config.lora.kind"
        )

    def init(
        self,
        key: Array,
        specs: Mapping[str, Spec],
        config: LoRAConfig,
        base: Mapping[str, Matrix] = MappingProxyType({}),
        inputs: Mapping[str, InputDirections] = MappingProxyType({}),
    ) -> Adapters:
        """All adapters at their start, which no seed of a run changes."""
        own = self.specs(specs, config)
        sizes = [self._sizes(factors) for factors in own.values()]
        widest = [max(size) for size in zip(*sizes, strict=True)]
        keys = jax.random.split(jax.random.key(0))
        # Drawn as PEFT draws them, from Kaiming's uniform distribution.
        left, right = (
            jax.random.uniform(
                own_key, (size, widest[1]), jnp.float32, -1.0, 1.0
            ) * math.sqrt(6 / fan_in)
            for own_key, size, fan_in in zip(
                keys, (widest[0], widest[2]), (widest[0], widest[1]), strict=True
            )
        )  # fmt: skip
        started = {}
        for path, factors in own.items():
            inputs, rank, outputs = self._sizes(factors)
            a, b = left[:inputs, :rank], right[:outputs, :rank].T
            d = jnp.full(factors["lambda_d"].shape, START, jnp.float32)
            started[path] = {
                "a0": a.reshape(factors["a0"].shape),
                "b0": b.reshape(factors["b0"].shape),
                "lambda_d": only_layers(d, factors["lambda_d"].layers),
                "lambda_b": jnp.zeros(factors["lambda_b"].shape, jnp.float32),
            }
        return started

    def init_matrix(
        self, key: Array, specs: Mapping[str, Spec], base: Matrix | None, scale: float
    ) -> Factors:
        raise NotImplementedError("the matrices of all paths are drawn at once")

    def settings(self, ranks: Mapping[str, int], config: LoRAConfig) -> Settings:
        scales = dict.fromkeys(ranks, 1.0)
        streams = {path: index for index, path in enumerate(sorted(ranks))}
        return Settings(scales=scales, streams=streams, dropout=config.dropout)

    def attach_matrix(
        self,
        base: Matrix,
        factors: Factors,
        scale: Array,
        key: Array | None,
        rate: Array | None,
    ) -> Leaf:
        a, b = jax.lax.stop_gradient((factors["a0"], factors["b0"]))
        first = scale.ndim
        d, gain = factors["lambda_d"], jnp.expand_dims(factors["lambda_b"], first)
        a, b = (jnp.expand_dims(x, range(first)) for x in (a, b))
        # A layer without an adapter has zeros in both factors, and no place in files.
        a = jnp.where(jnp.expand_dims(d != 0, range(first, a.ndim - 1)), a, 0.0)
        d = jnp.expand_dims(d, range(first + 1, b.ndim))
        return LowRank(base, a, d * b * gain, scale, key, rate)

    def rank(self, factors: Mapping[str, Any]) -> int:
        return factors["lambda_d"].shape[-1]

    def stack_axes(self, base: Any, factors: Mapping[str, Any]) -> int:
        return len(factors["lambda_d"].shape) - 1

    def _sizes(self, factors: Mapping[str, Spec]) -> tuple[int, int, int]:
        """Inputs, rank and outputs of one matrix."""
        a, b = factors["a0"].as_matrix.shape, factors["b0"].as_matrix.shape
        return a[0], a[1], b[1]


KIND = VeRA()
