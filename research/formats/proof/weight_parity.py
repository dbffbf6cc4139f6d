"""Compares numbers in files with those of a run, each with what rounding explains."""

import dataclasses
import functools
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
from research.weights.representations.weight_decomposed import WeightDecomposed

Array = jax.Array
# A sum in another order: so many units in the last place of the sum of magnitudes.
# Ranks of some hundreds stay far below it.
NOISE = 64 * 2.0**-24
TINY = 1e-37  # Below it a device may take a number for zero.


def layer_of(leaf: Matrix, place: Array | None) -> Matrix:
    """The layer at `place` of a stacked parameter, stacked alone; None: all of it."""
    if place is None:
        return leaf
    return jax.tree.map(lambda x: x[place][None], leaf)


def vocabulary_rows(leaf: Matrix, ids: Array, is_head: bool) -> Matrix:
    """Rows `[n, D]` of a table `[V, D]`, or of a head `[D, V]`, in float32."""
    return _rows(transpose(leaf) if is_head else leaf, ids)


def _rows(leaf: Matrix, ids: Array) -> Matrix:
    if isinstance(leaf, WeightDecomposed):
        gain = leaf.gain[ids] if leaf.flipped else leaf.gain
        return dataclasses.replace(leaf, inner=_rows(leaf.inner, ids), gain=gain)
    if not isinstance(leaf, LowRank):
        return lookup(leaf, ids, jnp.float32)
    a = lookup(leaf.a, ids, jnp.float32)
    return dataclasses.replace(leaf, base=_rows(leaf.base, ids), a=a)


@functools.partial(jax.jit, static_argnums=(4, 5))
def compare_numbers(
    leaf: Matrix,
    base: Matrix | None,
    found: Array,
    place: Array | None,
    numbers: StoredNumbers,
    axes: Axes,
) -> dict[str, Array]:
    """How far `found` in a file is from what a run has.

    Args:
      leaf: the parameter of the run.
      base: of the base model; None where the run trained no adapter of it.
      found: one layer of the parameter in the file, or what the file adds to the base
        model's.
      place: the layer, see `layer_of`.
      numbers: those in the file.
      axes: of `found`.

    Returns:
      `share`, the largest difference in units of what is explained; sums of squares
      `apart` of the differences and `size` of the update, and `kept`, the product of
      the update with what is left of it.
    """
    leaf, base = layer_of(leaf, place), layer_of(base, place)
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


@functools.partial(jax.jit, static_argnums=(2, 3))
def round_numbers(
    leaf: Matrix, place: Array | None, numbers: StoredNumbers, axes: Axes
) -> Array:
    """A layer of the run as a file of such numbers gives it back."""
    return rounded(_float32(layer_of(leaf, place)), numbers, axes)


@jax.jit
def add_update(base: Matrix, update: Array, place: Array | None) -> Array:
    """A layer of the base model with what files add to it."""
    return _float32(layer_of(base, place)) + update.astype(jnp.float32)


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
