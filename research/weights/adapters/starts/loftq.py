"""LoftQ: LoRA that starts at what the codes of a quantised base have lost."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.weights.adapters.adapter_kind import Factors
from research.weights.adapters.lora import LoRA
from research.weights.over_stack import over_stack
from research.weights.parameter_spec import Spec

Array = jax.Array
ROUNDING = 1e-6  # Singular values below this share of the largest are zeros.


class LoftQ(LoRA):
    """Li et al. 2023, arXiv:2310.08659, algorithm 1 with one round, PEFT's default.

    With the codes Q of a weight W, and W - Q = U S V: A = U sqrt(S / s) and
    B = sqrt(S / s) V of the largest singular values, so that s A B is the nearest
    matrix of its rank to what Q lacks. PEFT leaves the scale s out, which is the same
    where alpha is the rank. With one round the codes are those of every other run.

    A direction in which nothing was lost starts as that of plain LoRA, since two zeros
    would never train: all of a matrix that is stored as it is.
    """

    name = "loftq"
    is_exact = False
    reads_lost = True
    decomposes = True

    def init_matrix(
        self,
        key: Array,
        specs: Mapping[str, Spec],
        base: Any,
        scale: float,
    ) -> Factors:
        """`base` is a `LostInCodes`, or what else `take` expects with stacking axes.

        Returns when it is done: what the next path has lost may need the room."""
        if base is None:
            raise UserError(
                "adapters of kind 'loftq' start from what a quantised base has lost: "
                "use --config.model.quantize=nf4, or another config.lora.kind"
            )

        def start(key: Array, base: Any) -> Factors:
            plain = super(LoftQ, self).init_matrix(key, specs, None, scale)
            one = functools.partial(self._of_matrix, specs=specs, scale=scale)
            return over_stack(one, specs["a"].stacked)((base, plain))

        return jax.block_until_ready(jax.jit(start)(key, base))

    def take(self, lost: Any, inputs: int, rank: int) -> tuple[Array, Array, Array]:
        """`[in, rank]`, `[rank]`, `[rank, out]`: the nearest product to one matrix."""
        whole = lost.subtract().reshape(inputs, -1)
        left, sizes, right = jnp.linalg.svd(whole, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]

    def _of_matrix(
        self, parts: tuple[Any, Factors], specs: Mapping[str, Spec], scale: float
    ) -> Factors:
        """The factors of one matrix; `parts` also has those of plain LoRA."""
        lost, plain = parts
        inputs, rank = specs["a"].as_matrix.shape[-2:]
        left, sizes, right = self.take(lost, inputs, rank)
        is_lost, root = sizes > ROUNDING * sizes[0], jnp.sqrt(sizes / scale)
        a, b = plain["a"].reshape(inputs, rank), plain["b"].reshape(rank, -1)
        a = jnp.where(is_lost[None], left * root[None], a)
        b = jnp.where(is_lost[:, None], root[:, None] * right, b)
        return {"a": a.reshape(plain["a"].shape), "b": b.reshape(plain["b"].shape)}


KIND = LoftQ()
