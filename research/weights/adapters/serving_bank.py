"""One frozen base with room for many adapters, which are exchanged between two rounds.

    params = bank(base, model.specs, adapters=8, rank=16)   # all of them are the base
    params = set_row(params, 3, bank_row(params, adapted))  # no program is compiled
    weights = rows(params, choice_B)                        # inside a program

Adapter 0 stays empty: it is the base, bit for bit. The result of a row of the batch
depends neither on the choices of others nor on what the rest of the bank holds.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.core.errors import UserError
from research.weights.parameter_spec import Spec
from research.weights.representations.adapter_bank import AdapterBank
from research.weights.representations.low_rank import LowRank
from research.weights.representations.weight_decomposed import WeightDecomposed

Array = jax.Array
Params = dict[str, Any]
Factors = dict[str, Array]
# The factors of one adapter by path, padded to the shapes of the bank.
Row = dict[str, Factors]


def bank_specs(spec: Spec, adapters: int, rank: int) -> dict[str, Spec]:
    """Shapes and axis names of what a bank holds beside the matrix `spec`."""
    stack, split, size = spec.stacked, spec.stacked + spec.n_in, adapters * rank

    def beside(size: int, axes: slice) -> Spec:
        shape = (*spec.shape[:stack], size, *spec.shape[axes])
        return Spec(shape, (*spec.axes[:stack], "rank", *spec.axes[axes]), 0, stack)

    return {
        "a": beside(size, slice(stack, split)),
        "b": beside(size, slice(split, None)),
        "scale": beside(adapters, slice(0, 0)),
        "stretch": beside(adapters, slice(split, None)),
    }


def bank(
    params: Params,
    specs: Mapping[str, Spec],
    adapters: int,
    rank: int,
    *,
    paths: Collection[str] = (),
    gains: bool = False,
    dtype: Any = jnp.float32,
    zeros: Callable[[Spec, Any], Array] = lambda spec, dtype: jax.device_put(
        np.zeros(spec.shape, dtype)
    ),
) -> Params:
    """`params` with an empty `AdapterBank` in the place of every matrix of `paths`.

    Args:
      params: the frozen base by path.
      specs: of the model.
      adapters: how many can be chosen from, the base as number 0 included.
      rank: the largest that an adapter can have.
      paths: of the matrices that adapters may change; by default those of the layers.
      gains: whether there is room for adapters that multiply outputs, as DoRA does.
      dtype: of the factors; that of activations loses nothing, see `LowRank`.
      zeros: `(spec, dtype) -> array`, makes an array where it will lie.
    """
    if adapters < 2 or rank < 1:
        raise ValueError(f"a bank of {adapters} adapters of rank {rank} holds none")
    paths = set(paths) or {p for p, spec in specs.items() if spec.n_in and spec.stacked}
    with_bank = dict(params)
    for path in sorted(paths):
        own = bank_specs(specs[path], adapters - 1, rank)
        if not gains:
            del own["stretch"]
        dtypes = {"a": dtype, "b": dtype}
        arrays = {x: zeros(own[x], dtypes.get(x, jnp.float32)) for x in own}
        with_bank[path] = AdapterBank(params[path], **arrays)
    return with_bank


def bank_row(params: Params, adapted: Mapping[str, Any]) -> Row:
    """The adapters of `adapted`, padded with zeros to the shapes of the bank.

    They are padded where they lie: no host needs all of a factor, and nothing is
    compiled.

    Args:
      params: with a bank.
      adapted: by path, leaves that adapters were attached to; arrays are ignored. An
        empty dictionary gives the row of the base.

    Raises:
      UserError: an adapter is of another kind, has another rank or target than the
        bank has room for, or holds a number that is not finite.
    """
    banks = {p: leaf for p, leaf in params.items() if isinstance(leaf, AdapterBank)}
    changed = {p: leaf for p, leaf in adapted.items() if not isinstance(leaf, Array)}
    for path, leaf in changed.items():
        gained = type(leaf) is WeightDecomposed
        if type(leaf.inner if gained else leaf) is not LowRank:
            raise UserError(
                f"the adapter of {path} is a {type(leaf).__name__}, and only low-rank "
                "updates and DoRA fit beside others in one batch: export the run with "
                "--format=hf, or merge the adapter folder with PEFT, and serve that "
                "model"
            )
        if path not in banks:
            raise UserError(
                f"the adapter changes {path}, and this server has room only for "
                f"adapters of {', '.join(banks)}: start it with this run"
            )
        if gained and banks[path].stretch is None:
            raise UserError(
                f"the adapter of {path} is DoRA, and this server has room only for "
                "low-rank updates: start it with this run"
            )
        low = leaf.inner if gained else leaf
        if (rank := low.a.shape[-1]) > banks[path].rank:
            raise UserError(
                f"the adapter of {path} has rank {rank}, and this server has room for "
                f"ranks up to {banks[path].rank}: start it with this run"
            )
    row = {path: _padded(own, changed.get(path)) for path, own in banks.items()}
    if odd := [
        path for path in changed if not all(map(_is_finite, row[path].values()))
    ]:
        # It would reach every row of a batch: 0 * NaN is not 0.
        raise UserError(
            f"the adapter holds numbers that are not finite ({', '.join(odd[:3])}): "
            "its run has diverged; load an earlier step"
        )
    return row


def _is_finite(x: Array) -> bool:
    """Whether the part of `x` on this host is; compiles nothing."""
    return all(np.isfinite(np.asarray(s.data)).all() for s in x.addressable_shards)


def set_row(params: Params, index: int, row: Row) -> Params:
    """`params` with `row` as adapter `index`; one program writes every row.

    The factors of the bank are donated: `params` must not be used again.
    """
    banks = {path: params[path] for path in row}
    adapters = next(iter(banks.values())).adapters
    if not 0 < index <= adapters:
        raise ValueError(f"adapter {index} of 1 to {adapters}; 0 is the base")
    factors = {
        path: {name: getattr(own, name) for name in row[path]}
        for path, own in banks.items()
    }
    where = jax.tree.map(lambda x: x.sharding, factors)
    # Under equal shardings of another name, programs would compile again.
    written = jax.device_put(_write(factors, row, np.int32(index - 1)), where)
    return params | {
        path: dataclasses.replace(own, **written[path]) for path, own in banks.items()
    }


def rows(params: Params, choice: Array) -> Params:
    """`params` for a batch whose row i uses adapter `choice[i]`; `choice` is `[B]`."""
    return {
        path: leaf.bound(choice) if isinstance(leaf, AdapterBank) else leaf
        for path, leaf in params.items()
    }


@functools.partial(jax.jit, donate_argnums=0)
def _write(banks: dict[str, Factors], row: Row, index: Array) -> dict[str, Factors]:
    def one(whole: Array, part: Array) -> Array:
        # In units of `part`; 0 in every axis in which they do not differ.
        starts = [
            index * n if n != m else 0
            for n, m in zip(part.shape, whole.shape, strict=True)
        ]
        return jax.lax.dynamic_update_slice(whole, part, starts)

    return jax.tree.map(one, banks, row)


def _padded(own: AdapterBank, leaf: LowRank | WeightDecomposed | None) -> Factors:
    axis = own.scale.ndim - 1
    sizes = {"a": own.rank, "b": own.rank, "scale": 1}
    if own.stretch is not None:
        sizes["stretch"] = 1
    found: dict[str, Any] = {}
    if isinstance(leaf, WeightDecomposed):
        found["stretch"] = jnp.expand_dims(leaf.gain - 1, axis)
        leaf = leaf.inner
    if leaf is not None:
        found |= {"a": leaf.a, "b": leaf.b, "scale": leaf.scale[..., None]}

    def one(name: str, size: int) -> Array:
        like = getattr(own, name)
        empty = np.zeros((*like.shape[:axis], 0, *like.shape[axis + 1 :]), np.float32)
        # The rank of `a` is its last axis, and comes first in the bank.
        last = like.ndim - 1 if name == "a" and name in found else axis
        return _widened(found.get(name, empty), like, last, axis, size)

    return {name: one(name, size) for name, size in sizes.items()}


def _widened(x: Any, like: Array, axis: int, moved: int, size: int) -> Array:
    """`x` as `like` lies: `axis`, which no device splits, is `moved` and has `size`.

    It ends in zeros.
    """
    where = like.sharding
    if isinstance(where, NamedSharding) and axis != moved:
        names = [*where.spec] + [None] * (like.ndim - len(where.spec))
        names.insert(axis, names.pop(moved))
        where = NamedSharding(where.mesh, PartitionSpec(*names))
    if not like.is_fully_addressable and getattr(x, "is_fully_addressable", True):
        # Every process has all of it, and takes its own part.
        whole = np.asarray(x)
        x = jax.make_array_from_callback(x.shape, where, whole.__getitem__)
    x = jax.device_put(x, where)
    missing = [(0, size - x.shape[axis] if i == moved else 0) for i in range(x.ndim)]
    parts = [
        jax.device_put(np.pad(part, missing).astype(like.dtype), shard.device)
        for shard in x.addressable_shards
        for part in [np.moveaxis(np.asarray(shard.data), axis, moved)]
    ]
    shape = (*like.shape[:moved], size, *like.shape[moved + 1 :])
    return jax.make_array_from_single_device_arrays(shape, like.sharding, parts)
