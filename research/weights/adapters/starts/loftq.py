"""LoftQ: LoRA that starts at what the codes of a quantised base have lost."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.weights.adapters.adapter_kind import Factors
from research.weights.adapters.lora import LoRA
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

Array = jax.Array


class LoftQ(LoRA):
    """Li et al. 2023, arXiv:2310.08659, algorithm 1 with one round, PEFT's default.

    With the codes Q of a weight W, and W - Q = U S V: A = U sqrt(S / s) and
    B = sqrt(S / s) V of the largest singular values, so that s A B is the nearest
    matrix of its rank to what Q lacks. PEFT leaves the scale s out, which is the same
    where alpha is the rank. With one round the codes are those of every other run.

    It starts from what is lost: its `base` is W - Q, in the place of the weight.
    """

    name = "loftq"
    is_exact = False
    reads_lost = True

    def init_matrix(
        self, key: Array, specs: Mapping[str, Spec], base: Matrix | None, scale: float
    ) -> Factors:
        a, b = specs["a"], specs["b"]
        if base is None:
            raise UserError(
                "adapters of kind 'loftq' start from what a quantised base has lost: "
                "use --config.model.quantize=nf4, or another config.lora.kind"
            )
        (inputs, rank), outputs = a.as_matrix.shape[-2:], b.as_matrix.shape[-1]

        def one(lost: Array) -> tuple[Array, Array]:
            left, sizes, right = jnp.linalg.svd(lost, full_matrices=False)
            root = jnp.sqrt(sizes[:rank] / scale)
            return left[:, :rank] * root[None], root[:, None] * right[:rank]

        left, right = jax.lax.map(one, base.reshape(-1, inputs, outputs))
        return {"a": left.reshape(a.shape), "b": right.reshape(b.shape)}


KIND = LoftQ()
