"""QERA: LoRA that starts at the part of what codes have lost that inputs meet most."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.weights.adapters.measured_inputs import InputDirections
from research.weights.adapters.starts.loftq import LoftQ
from research.weights.adapters.starts.pissa import fast_svd
from research.weights.representations.leaf import Matrix
from research.weights.representations.lost_in_codes import LostInCodes

Array = jax.Array
PER_RANK = 4  # Directions of the inputs that are told apart, for each of the rank.
ROUNDS = 4  # Subspace iterations, few as the singular values fall fast.
LEAST = 1e-4  # The least weight of a direction, against the mean square of inputs.


class Met(NamedTuple):
    """The loss of codes in the matrices of a path, and the inputs that meet them."""

    lost: LostInCodes
    inputs: InputDirections


class QERA(LoftQ):
    """Zhang et al. 2024, arXiv:2410.06040, theorem 1 ("QERA-exact").

    With inputs of second moment R and a loss L = W - Q of the codes, the outputs miss
    E|x L - s x A B|^2, which is least where R^(1/2) s A B is the nearest matrix of its
    rank to R^(1/2) L. The paper takes the whole of R. Here its largest directions are
    measured, `PER_RANK` for each of the rank, and it is taken as even in the others. So
    what a host holds stays of the size of the adapters.

    The codes are those of every other run, and so is the size of the adapters.
    """

    name = "qera"
    reads_inputs = True
    about_mean = False

    def directions(self, rank: int) -> int:
        return PER_RANK * rank

    def source(
        self,
        path: str,
        base: Mapping[str, Matrix],
        inputs: Mapping[str, InputDirections],
    ) -> Met:
        return Met(base[path], inputs[path])

    def take(self, lost: Met, inputs: int, rank: int) -> tuple[Array, Array, Array]:
        along, sizes, rest = _root(lost.inputs)
        whole = lost.lost.subtract().reshape(inputs, -1)
        heard = _times(along, sizes, rest, whole)
        left, found, right = fast_svd(heard, rank, ROUNDS)
        left = _times(along, 1 / sizes, 1 / rest, left[:, :rank])
        return left, found[:rank], right[:rank]


def _root(inputs: InputDirections) -> tuple[Array, Array, Array]:
    """R^(1/2) but for a factor: directions, their sizes, and that of all others."""
    along, shares = inputs.directions, inputs.shares
    count, told = along.shape
    sizes = jnp.sqrt(jnp.maximum(shares * count, LEAST))
    others = (1 - jnp.sum(shares)) * count / max(count - told, 1)
    return along, sizes, jnp.sqrt(jnp.maximum(others, LEAST))


def _times(along: Array, sizes: Array, rest: Array, matrix: Array) -> Array:
    """`matrix` `[in, n]`, with its part along each direction times that one's size."""
    part = jnp.matmul(along.T, matrix, precision="highest")
    part = jnp.matmul(along, (sizes - rest)[:, None] * part, precision="highest")
    return rest * matrix + part


KIND = QERA()
