"""Rows of logits split over a mesh: each device has whole rows, and as few as possible.

The partitioner would gather logits, which are as wide as the vocabulary, to every
device wherever rows are sorted.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.parallel import mesh as meshes

Array = jax.Array
TopK = Callable[[Array, int], tuple[Array, Array]]
# Devices along `tensor` hold the same rows of a batch: each may take a part of them.
ROW_AXES = (*meshes.BATCH_AXES, "tensor")


def rows_partition(mesh: Mesh, rows: int) -> PartitionSpec:
    """Rows over all of `ROW_AXES`, or over the batch axes, or whole: what divides."""
    for axes in (ROW_AXES, meshes.BATCH_AXES):
        if rows % meshes.ways(mesh, axes) == 0:
            return PartitionSpec(axes)
    return PartitionSpec()


def make_place(mesh: Mesh) -> Callable[[Array], Array]:
    """Makes the function that splits logits `[R, V]` by rows, as far as they divide."""

    def place(logits_RV: Array) -> Array:
        sizes = dict(zip(("batch", "vocab"), logits_RV.shape, strict=True))
        split = meshes.partition_if_divisible(mesh, sizes)
        # As the head is split, and then by row. The partitioner would else gather the
        # head, which is a thousand times larger than the logits.
        logits_RV = _pin(mesh, logits_RV, split)
        return _pin(mesh, logits_RV, rows_partition(mesh, logits_RV.shape[0]))

    return place


def make_gather_head(
    mesh: Mesh, specs: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Makes the function that gathers a vocabulary head over the batch's axes.

    Each device then has all inputs of the ids that it scores. Within a loop the
    partitioner would gather the head again for each token. A head that stands in
    another form than that of its `Spec` stays as it is.

    Args:
      mesh: where the head lies.
      specs: of parameters by path.
    """

    def gather(head: Mapping[str, Any]) -> dict[str, Any]:
        return {path: one(path, leaf) for path, leaf in head.items()}

    def one(path: str, leaf: Any) -> Any:
        if mesh.size == 1 or not isinstance(leaf, jax.Array):
            return leaf
        split = meshes.partition(specs[path].axes, path, mesh)
        return _pin(mesh, leaf, PartitionSpec(*map(_without_batch, split)))

    return gather


def _without_batch(entry: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(name for name in names if name not in meshes.BATCH_AXES) or None


def top_k_of_placed(mesh: Mesh) -> TopK:
    """Makes `jax.lax.top_k` of rows `[R, V]` that `make_place` has split."""

    def top_k(x_RV: Array, count: int) -> tuple[Array, Array]:
        rows = rows_partition(mesh, x_RV.shape[0])
        return jax.shard_map(
            lambda x: tuple(jax.lax.top_k(x, count)),
            mesh=mesh,
            in_specs=rows,
            out_specs=(rows, rows),
            check_vma=False,
        )(x_RV)

    return jax.lax.top_k if mesh.size == 1 else top_k


def top_k_of_whole(mesh: Mesh) -> TopK:
    """Makes `jax.lax.top_k` of rows that all devices hold, split as the head is."""
    place, of_placed = make_place(mesh), top_k_of_placed(mesh)

    def top_k(x_RV: Array, count: int) -> tuple[Array, Array]:
        vocab = meshes.partition_if_divisible(mesh, {"vocab": x_RV.shape[1]})
        # Otherwise the tokens of the rows would be split, back to their embeddings.
        x_RV = _pin(mesh, x_RV, PartitionSpec(None, *vocab))
        return of_placed(place(x_RV), count)

    return jax.lax.top_k if mesh.size == 1 else top_k


def _pin(mesh: Mesh, x: Array, where: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, where))
