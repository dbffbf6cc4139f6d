"""PiSSA: LoRA that trains the principal part of each matrix."""

import jax
import jax.numpy as jnp

from research.weights.adapters.shifted import ShiftedLoRA


class PiSSA(ShiftedLoRA):
    """Meng et al. 2024, arXiv:2404.02948, equations 2 to 4, with PEFT's scale.

    With W = U S V: A = U sqrt(S / s) and B = sqrt(S / s) V of the largest singular
    values, so that s A B is the nearest matrix of that rank.
    """

    name = "pissa"

    def take(
        self, weight: jax.Array, rank: int, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        left, sizes, right = jnp.linalg.svd(weight, full_matrices=False)
        root = jnp.sqrt(sizes[:rank] / scale)
        return left[:, :rank] * root[None], root[:, None] * right[:rank]


KIND = PiSSA()
