"""A table of embeddings whose rows come with random noise, for training alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.contraction import contract, lookup, materialize, transpose
from research.weights.representations.leaf import Leaf, Matrix

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyTable(Leaf):
    """`base`, whose looked-up rows are noisy. A tied head reads it without noise.

    Jain et al. 2023, arXiv:2310.05914, algorithm 1.

    Attributes:
      base: `[vocabulary, embed]`.
      key: of this batch alone.
      bound: `[rows, seq]` float32; the noise of a token is uniform in +-bound.
    """

    base: Matrix
    key: Array
    bound: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def contract(self, x: Array, n_in: int, dtype: Any) -> Array:
        return contract(x, self.base, n_in, dtype)

    def lookup(self, ids: Array, dtype: Any) -> Array:
        """Raises ValueError: `ids` are not those of the batch that has the bounds."""
        if ids.shape != self.bound.shape:
            raise ValueError(
                f"noise for tokens {self.bound.shape} and ids {ids.shape}: look up the "
                "embeddings of the whole microbatch at once"
            )
        rows = lookup(self.base, ids, dtype)
        noise = jax.random.uniform(self.key, rows.shape, jnp.float32, -1.0, 1.0)
        return rows + (noise * self.bound[..., None]).astype(dtype)

    def transpose(self) -> Matrix:
        return transpose(self.base)

    def materialize(self) -> Array:
        return materialize(self.base)


def noise_bounds(segments: Array, alpha: float, width: int) -> Array:
    """alpha / sqrt(L D) for each token, where L are the tokens of its document.

    So a document has the same noise in every packed row, and as in the authors' code
    padding does not count. Where one document fills a row it is what transformers
    computes, whose L is the row's length.

    Args:
      segments: `[rows, seq]`, the number of each token's document, 0 for padding.
      alpha: `config.optim.neftune_noise_alpha`.
      width: of an embedding, D.

    Returns:
      `[rows, seq]` float32, 0 for padding.
    """

    def one(row: Array) -> Array:
        counts = jnp.zeros(row.size + 1, jnp.float32).at[row].add(1.0)
        return jnp.where(row > 0, alpha * jax.lax.rsqrt(counts[row] * width), 0.0)

    return jax.vmap(one)(segments)
