"""OLoRA: LoRA that starts at an orthonormal basis of each matrix."""

import jax
import jax.numpy as jnp

from research.weights.adapters.starts.shifted import ShiftedLoRA


class OLoRA(ShiftedLoRA):
    """Buyukakyuz 2024, arXiv:2406.01775, section 3, as PEFT computes it.

    With `W [out, in] = Q R`: B has the first columns of Q, and A the first rows of R.
    """

    name = "olora"

    def take(
        self, weight: jax.Array, rank: int, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        basis, rest = jnp.linalg.qr(weight.T)
        return rest[:rank].T, basis[:, :rank].T


KIND = OLoRA()
