"""LoRA with A and B in orthogonal halves of the rank: PEFT's `"orthogonal"`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from research.weights.adapters.adapter_kind import Factors
from research.weights.adapters.lora import LoRA
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

SIZE = 0.1  # The deviation of both factors, as in PEFT.


class OrthogonalLoRA(LoRA):
    """Both factors are random, and A B is zero as far as rounding allows.

    The source is https://datta0.github.io/posts/rethink-lora-init/: rows of A are
    combinations of every second row of a random rotation, columns of B of the others.
    """

    name = "orthogonal"
    is_exact = False

    def rank_fault(self, spec: Spec, rank: int) -> str:
        if rank % 2:
            return (
                f"its lora.rank is {rank}, and each factor of an orthogonal start uses "
                "half of it: make it even"
            )
        return super().rank_fault(spec, rank)

    def init_matrix(
        self,
        key: jax.Array,
        specs: Mapping[str, Spec],
        base: Matrix | None,
        scale: float,
    ) -> Factors:
        a, b = specs["a"], specs["b"]
        (*stack, inputs, rank), outputs = a.as_matrix.shape, b.as_matrix.shape[-1]
        half = rank // 2
        # One draw for all of them, as each takes a CPU seconds to compile.
        sizes = np.cumsum([rank * rank, inputs * half, half * outputs])
        drawn = jax.random.normal(key, (*stack, sizes[-1]), jnp.float32)
        turn, left, right = (
            part.reshape(*stack, -1, columns)
            for part, columns in zip(
                jnp.split(drawn, sizes[:-1], -1), (rank, half, outputs), strict=True
            )
        )
        turn = jnp.linalg.qr(turn)[0]
        odd, even = turn[..., 0::2, :], turn[..., 1::2, :]
        return {
            "a": (SIZE * left @ odd).reshape(a.shape),
            "b": (SIZE * jnp.swapaxes(even, -1, -2) @ right).reshape(b.shape),
        }


KIND = OrthogonalLoRA()
