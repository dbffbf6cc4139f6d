"""Brings each token to its experts and back, with none dropped.

The seam is `mix_experts`, as `attend` is that of attention. Letters of shapes: as in
`attention.py`, and E experts, C chosen ones of each token, M = B * T * C rows, sorted
by expert. Both ways are gathers, in the backward pass as well: JAX would turn the
gradient of a gather into a scatter that adds, which no device does fast.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.weights.representations.grouped_product import GROUPED_PRODUCT, Groups

Array = jax.Array
# A CPU multiplies more rows at a time no faster.
LARGEST_BLOCK = 256
# To gather rows again, and to apply the gate again, costs less than to keep the results
# of both for every layer.
KEPT = jax.checkpoint_policies.save_only_these_names(GROUPED_PRODUCT)
# `(weights, rows [M, D], shares [M], groups) -> [M, D]`: the experts of all rows, times
# the shares. Rows without an expert come out as zeros.
Compute = Callable[[Any, Array, Array, Groups], Array]


class _Places(NamedTuple):
    """Where things lie: the token and the choice of row m, and the rows of a token.

    Attributes:
      choice: int32, the index into all choices `[tokens * C]`.
      row: int32 `[tokens, C]`, undoes it.
    """

    choice: Array
    row: Array

    @property
    def token(self) -> Array:
        return self.choice // self.row.shape[1]


def mix_experts(
    compute: Compute,
    weights: Any,
    x_BTD: Array,
    chosen_BTC: Array,
    shares_BTC: Array,
    *,
    experts: int,
    first_row: Array | int = 0,
    kernel: str = "blocked",
    block: int = 0,
) -> Array:
    """The sum of each token's chosen experts, each times its share.

    Args:
      compute: the experts as a function of sorted rows.
      weights: of the experts, each `[E, ...]`.
      x_BTD: inputs.
      chosen_BTC: int32, the experts of each token. A number that is none of 0 to E - 1
        stands for no expert (padding, or an expert on another device), and counts 0.
      shares_BTC: float32, how much each of them counts.
      experts: E.
      first_row: the number of the first of these rows in the whole batch.
      kernel: see `Groups`, as is `block`; 0: as many rows as an expert has, if each
        has as many, and at most `LARGEST_BLOCK`.

    Returns:
      `[B, T, D]` in the dtype of `x_BTD`.
    """
    batch, length, width = x_BTD.shape
    chosen_NC = chosen_BTC.reshape(batch * length, -1)
    block = block or min(LARGEST_BLOCK, 1 << (chosen_NC.size // experts).bit_length())
    owners_NC = jnp.where((chosen_NC >= 0) & (chosen_NC < experts), chosen_NC, experts)
    places, groups = _sort(owners_NC, experts, batch, kernel, block)
    groups = dataclasses.replace(groups, origins=groups.origins + first_row)

    @functools.partial(jax.checkpoint, policy=KEPT, prevent_cse=False)
    def mix(weights: Any, x_ND: Array, shares_NC: Array) -> Array:
        rows_MD, shares_M = _spread(x_ND, places), _sorted(shares_NC, places)
        return _collect(compute(weights, rows_MD, shares_M, groups), places)

    shares_NC = shares_BTC.reshape(chosen_NC.shape)
    return mix(weights, x_BTD.reshape(-1, width), shares_NC).reshape(x_BTD.shape)


def _sort(
    owners_NC: Array, experts: int, batch: int, kernel: str, block: int
) -> tuple[_Places, Groups]:
    owners = owners_NC.reshape(-1)
    choice = jnp.argsort(owners, stable=True).astype(jnp.int32)
    row = jnp.argsort(choice).astype(jnp.int32).reshape(owners_NC.shape)
    is_own = owners[:, None] == jnp.arange(experts, dtype=owners.dtype)[None]
    groups = Groups(
        sizes=jnp.sum(is_own, axis=0, dtype=jnp.int32),
        owners=owners[choice],
        origins=choice // (owners.size // batch),
        kernel=kernel,
        block=block,
    )
    return _Places(choice, row), groups


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


@jax.custom_vjp
def _spread(x_ND: Array, places: _Places) -> Array:
    """The token of each sorted row: `[M, D]`."""
    return _take(x_ND, places.token)


@jax.custom_vjp
def _collect(rows_MD: Array, places: _Places) -> Array:
    """The sum over the rows of each token, in float32: `[tokens, D]`."""
    # A CPU adds up one axis among others several times as slowly.
    chosen = [_take(rows_MD, row_N).astype(jnp.float32) for row_N in places.row.T]
    return functools.reduce(jnp.add, chosen).astype(rows_MD.dtype)


# Each is the transpose of the other.
_spread.defvjp(
    lambda x_ND, places: (_spread(x_ND, places), places),
    lambda places, d_MD: (_collect(d_MD, places), None),
)
_collect.defvjp(
    lambda rows_MD, places: (_collect(rows_MD, places), places),
    lambda places, d_ND: (_spread(d_ND, places), None),
)


@jax.custom_vjp
def _sorted(shares_NC: Array, places: _Places) -> Array:
    """The share of each sorted row: `[M]`."""
    return _take(shares_NC.reshape(-1), places.choice)


_sorted.defvjp(
    lambda shares_NC, places: (_sorted(shares_NC, places), places),
    lambda places, d_M: (_take(d_M, places.row), None),
)
