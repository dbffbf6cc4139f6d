"""Where the slots lie on a mesh, and how rows of logits are split over its devices.

Keys and values lie as the model's attention needs them. The arrays `[S, V]` of how
tokens are chosen are larger than the rest of a slot, and a row of them is of use only
where the logits of its slot are. So each device has the rows of its own slots: for 64
slots a chip over 256 chips and a vocabulary of 128,256, all rows would be 8 GB on each.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.engine.slot_programs import SlotRows, Slots, TopK
from research.engine.token_choice import ChoiceState
from research.models.cached_attention import cache_partition
from research.parallel import mesh as meshes

Array = jax.Array
# Arrays of `ChoiceState` that grow with the vocabulary.
WIDE = ("in_prompt", "counts", "allowed")
# Devices that hold one slot can each choose the tokens of a part of the slots.
ROW_AXES = (*meshes.BATCH_AXES, "tensor")


def rows_partition(mesh: Mesh, rows: int) -> PartitionSpec:
    """Rows over all of `ROW_AXES`, or over the batch axes, or whole: what divides."""
    for axes in (ROW_AXES, meshes.BATCH_AXES):
        if rows % meshes.ways(mesh, axes) == 0:
            return PartitionSpec(axes)
    return PartitionSpec()


def slot_shardings(mesh: Mesh, slots: int, kv_heads: int) -> Slots:
    """The shardings of the state, in the place of its arrays."""
    keys = NamedSharding(mesh, cache_partition(mesh, slots, kv_heads))
    whole, own = (
        meshes.replicated(mesh),
        NamedSharding(mesh, rows_partition(mesh, slots)),
    )
    choice = {field.name: whole for field in dataclasses.fields(ChoiceState)}
    choice |= dict.fromkeys(WIDE, own)
    rows = {field.name: whole for field in dataclasses.fields(SlotRows)}
    return Slots(keys, keys, SlotRows(**rows | {"choice": ChoiceState(**choice)}))


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


def top_k_of_placed(mesh: Mesh) -> TopK:
    """Makes `jax.lax.top_k` of rows `[R, V]` that `make_place` has split.

    The partitioner would gather all rows to every device.
    """

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
