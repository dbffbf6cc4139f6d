"""PiSSA: LoRA that trains the principal part of each matrix."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from research.config.knob_groups import LoRAConfig
from research.weights.adapters.adapter_kind import Adapters
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.adapters.starts.shifted import ShiftedLoRA
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

Array = jax.Array
SPARE = 10  # Directions beyond the rank; Halko et al. take 5 to 10 (section 1.3).


class PiSSA(ShiftedLoRA):
    """Meng et al. 2024, arXiv:2404.02948, equations 2 to 4, with PEFT's scale.

    With W = U S V: A = U sqrt(S / s) and B = sqrt(S / s) V of the largest singular
    values, so that s A B is the nearest matrix of that rank.

    Attributes:
      rounds: of subspace iteration in place of the exact decomposition; 0 for that.
    """

    name = "pissa"

    def __init__(self, rounds: int = 0):
        self.rounds = rounds

    def init(
        self,
        key: Array,
        specs: Mapping[str, Spec],
        config: LoRAConfig,
        base: Mapping[str, Matrix] = MappingProxyType({}),
        inputs: Mapping[str, InputDirections] = MappingProxyType({}),
    ) -> Adapters:
        """As every kind, with the decomposition that `config` asks for."""
        if self.rounds != config.pissa_niter:
            return PiSSA(config.pissa_niter).init(key, specs, config, base)
        return super().init(key, specs, config, base)

    def take(self, weight: Array, rank: int, scale: float) -> tuple[Array, Array]:
        if self.rounds:
            left, sizes, right = fast_svd(weight, rank, self.rounds)
        else:
            left, sizes, right = jnp.linalg.svd(weight, full_matrices=False)
        root = jnp.sqrt(sizes[:rank] / scale)
        return left[:, :rank] * root[None], root[:, None] * right[:rank]


def fast_svd(weight: Array, rank: int, rounds: int) -> tuple[Array, Array, Array]:
    """The largest `rank` singular values of `[in, out]`, nearly, with their vectors.

    Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1. The
    random directions are always the same, so a start does not depend on a run's seed.

    Returns:
      `[in, k]`, `[k]` and `[k, out]`, k being the rank and some spare directions.
    """
    inputs, outputs = weight.shape
    width = min(rank + SPARE, inputs, outputs)
    drawn = jax.random.normal(jax.random.key(0), (outputs, width), weight.dtype)
    basis = jnp.linalg.qr(weight @ drawn)[0]
    for _ in range(rounds):
        basis = jnp.linalg.qr(weight.T @ basis)[0]
        basis = jnp.linalg.qr(weight @ basis)[0]
    # A decomposition of the square factor alone, as one of `[k, out]` takes longer.
    beside, square = jnp.linalg.qr(weight.T @ basis)
    left, sizes, right = jnp.linalg.svd(square.T, full_matrices=False)
    return basis @ left, sizes, right @ beside.T


KIND = PiSSA()
