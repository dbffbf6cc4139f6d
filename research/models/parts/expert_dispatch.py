"""Brings each token to its experts and back, with none dropped.

The seam is `mix_experts`, as `attend` is that of attention. Letters of shapes: as in
`attention.py`, and E experts, C chosen ones of each token, M = B * T * C rows, sorted
by expert. Both ways are gathers, in the backward pass as well: JAX would turn the
gradient of a gather into a scatter that adds, which no device does fast.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.weights.representations.grouped_product import Groups

Array = jax.Array
# A CPU computes more rows no faster, and fewer in a fifth more time.
LARGEST_BLOCK = 128
# `(weights, rows [M, D], groups) -> [M, D]`: the experts of all rows. Rows without an
# expert come out as zeros.
Compute = Callable[[Any, Array, Groups], Array]


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
    rows_MD = _spread(x_BTD.reshape(-1, width), places)
    made_MD = compute(weights, rows_MD, groups)
    shares_NC = shares_BTC.reshape(chosen_NC.shape)
    return _collect(made_MD, shares_NC, places).reshape(x_BTD.shape)


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


def _spread_forward(x_ND, places):
    return _spread(x_ND, places), places


def _spread_backward(places, d_rows_MD):
    d_NCD = _take(d_rows_MD, places.row)
    d_ND = jnp.sum(d_NCD, axis=1, dtype=jnp.float32).astype(d_rows_MD.dtype)
    return d_ND, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(made_MD: Array, shares_NC: Array, places: _Places) -> Array:
    """The rows of each token, each times its share, in float32: `[tokens, D]`."""
    made_NCD = _take(made_MD, places.row).astype(jnp.float32)
    return jnp.sum(made_NCD * shares_NC[..., None], axis=1).astype(made_MD.dtype)


def _collect_forward(made_MD, shares_NC, places):
    return _collect(made_MD, shares_NC, places), (made_MD, shares_NC, places)


def _collect_backward(kept, d_ND):
    made_MD, shares_NC, places = kept
    share_M = _take(shares_NC.reshape(-1), places.choice)
    d_MD = _take(d_ND, places.token).astype(jnp.float32)
    d_share_M = jnp.sum(d_MD * made_MD.astype(jnp.float32), axis=1)
    d_made_MD = (d_MD * share_M[:, None]).astype(made_MD.dtype)
    return d_made_MD, _take(d_share_M, places.row), None


_collect.defvjp(_collect_forward, _collect_backward)
