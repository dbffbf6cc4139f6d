"""Compares numbers in files with those of a run, each with what rounding explains."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.formats.proof.stored_numbers import (
    KINDS,
    Axes,
    StoredNumbers,
    half_step,
    rounded,
)
from research.weights.contraction import lookup, materialize, transpose
from research.weights.representations.leaf import Leaf, Matrix
from research.weights.representations.low_rank import LowRank

Array = jax.Array
Leaves = Mapping[str, Any]
# Path, numbers and axes of the parameters that a file holds.
Held = tuple[tuple[str, StoredNumbers, Axes], ...]
# A sum in another order: so many units in the last place of the sum of magnitudes.
# Ranks of some hundreds stay far below it.
NOISE = 64 * 2.0**-24
TINY = 1e-37  # Below it a device may take a number for zero.


def layer_of(leaves: Leaves, place: Array | None) -> dict[str, Matrix]:
    """The layer at `place` of stacked parameters, stacked alone; None: all as it is."""
    if place is None:
        return dict(leaves)
    return {p: jax.tree.map(lambda x: x[place][None], v) for p, v in leaves.items()}


def vocabulary_rows(leaf: Matrix, ids: Array, is_head: bool) -> Matrix:
    """Rows `[n, D]` of a table `[V, D]`, or of a head `[D, V]`, in float32."""
    return _rows(transpose(leaf) if is_head else leaf, ids)


def _rows(leaf: Matrix, ids: Array) -> Matrix:
    if not isinstance(leaf, LowRank):
        return lookup(leaf, ids, jnp.float32)
    a = lookup(leaf.a, ids, jnp.float32)
    return dataclasses.replace(leaf, base=_rows(leaf.base, ids), a=a)


@functools.partial(jax.jit, static_argnums=4)
def compare_layer(
    leaves: Leaves, base: Leaves, found: Leaves, place: Array | None, held: Held
) -> dict[str, dict[str, Array]]:
    """How far the parameters in a file are from those of a run, by path.

    Args:
      leaves: the parameters of the run, at least those of `held`.
      base: of the base model, those of which the run trained an adapter.
      found: by path, one layer of the parameter in the file, or what the file adds to
        the base model's.
      place: the layer, see `layer_of`.
      held: how the file holds them.

    Returns:
      `share`, the largest difference in units of what is explained; sums of squares
      `apart` of the differences and `size` of the update, and `kept`, the product of
      the update with what is left of it.
    """
    leaves, base = layer_of(leaves, place), layer_of(base, place)
    return {
        path: _compare(leaves[path], base.get(path), found[path], numbers, axes)
        for path, numbers, axes in held
    }


def _compare(
    leaf: Matrix, base: Matrix | None, found: Array, numbers: StoredNumbers, axes: Axes
) -> dict[str, Array]:
    found, parts = found.astype(jnp.float32), _parts(leaf, base)
    update = parts.update
    if numbers.is_update:
        own = jnp.zeros_like(found) if update is None else update
        loss = 2.0 ** -KINDS[numbers.kind]
        explained = (2 * loss + loss**2 + NOISE) * parts.terms
        left = found
    else:
        own = parts.own
        explained = half_step(own, numbers, axes) + NOISE * parts.terms_of_all
        explained += NOISE * abs(numbers.shift)
        left = None if update is None else found - (own - update)
    apart = jnp.abs(found - own)
    sums = {"share": jnp.max(apart / (explained + TINY)), "apart": jnp.sum(apart**2)}
    if update is not None:
        sums |= {"size": jnp.sum(update**2), "kept": jnp.sum(left * update)}
    return sums


@functools.partial(jax.jit, static_argnums=2)
def round_layer(leaves: Leaves, place: Array | None, held: Held) -> dict[str, Array]:
    """The parameters of the run as a file of such numbers gives them back."""
    leaves = layer_of(leaves, place)
    return {
        path: rounded(_float32(leaves[path]), numbers, axes)
        for path, numbers, axes in held
    }


@jax.jit
def add_updates(
    base: Leaves, updates: Leaves, place: Array | None
) -> dict[str, Matrix]:
    """The base model's parameters, some with what files add to them."""
    base = layer_of(base, place)
    return base | {
        path: _float32(base[path]) + update.astype(jnp.float32)
        for path, update in updates.items()
    }


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A parameter of a run, and what it is a sum of.

    Attributes:
      own: the parameter.
      update: what adapters add; None without any.
      terms: the sum of the magnitudes of all products in the update. Rounding both
        factors moves it by a share of this.
      terms_of_all: of all numbers that are added up to `own`.
    """

    own: Array
    update: Array | None
    terms: Array | float
    terms_of_all: Array | float


def _parts(leaf: Matrix, base: Matrix | None) -> _Parts:
    if not isinstance(leaf, Leaf):
        return _Parts(_widened(leaf), None, 0.0, 0.0)
    if isinstance(leaf, LowRank):
        update, terms = (jax.tree.map(f, leaf).update() for f in (_widened, _magnitude))
        if isinstance(leaf.base, LowRank):  # Factors that are taken off, as in PiSSA.
            inner = _parts(leaf.base, None)
            return _Parts(
                inner.own + update,
                inner.update + update,
                inner.terms + terms,
                inner.terms_of_all + terms,
            )
        under = _float32(leaf.base)
        return _Parts(under + update, update, terms, jnp.abs(under) + terms)
    own, whole = (_float32(x) for x in (leaf, jax.tree.map(_magnitude, leaf)))
    update = None if base is None else own - _float32(base)
    return _Parts(own, update, whole, whole)


def _float32(leaf: Matrix) -> Array:
    return materialize(jax.tree.map(_widened, leaf)).astype(jnp.float32)


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _magnitude(x: Any) -> Any:
    return jnp.abs(_widened(x)) if jnp.issubdtype(x.dtype, jnp.number) else x
