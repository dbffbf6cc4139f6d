"""Experts on a mesh: whole experts lie on each device, and tokens come to them.

Experts are split over `expert` and `tensor`. Devices along `expert` hold different
rows: each gathers the tokens of all of them, computes its own experts, and gets back
the sum of what all have made of its rows. Devices along `tensor` hold the same rows, so
they only sum. No token is dropped, and no expert has a capacity: a device whose experts
are popular takes longer. It must have room for every token that it gathers, so it
computes those of one device after those of another, and keeps nothing but inputs.

A ragged all-to-all would send a token only to the devices of its experts. With 8
experts for each token and 8 devices it sends as much, into a buffer 8 times as large:
see docs/scale.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from research.models.parts.expert_dispatch import Compute
from research.parallel import mesh as meshes

Array = jax.Array
Mix = Callable[..., Array]


def make_mix_experts(mesh: Mesh, alone: Mix) -> Mix:
    """Makes `expert_dispatch.mix_experts` for global arrays on `mesh`.

    `alone` is that function, for the arrays of one device.
    """
    if mesh.size == 1:
        return alone
    over = meshes.partition(("expert",), mesh=mesh)[0]
    alone_in_row = mesh.shape["expert"] == 1
    # A device along `expert` has the rows behind those of the one before it.
    outer = meshes.BATCH_AXES[: meshes.BATCH_AXES.index("expert")]

    def mix(
        compute: Compute,
        weights: Any,
        x_BTD: Array,
        chosen_BTC: Array,
        shares_BTC: Array,
        *,
        experts: int,
    ) -> Array:
        here = experts // meshes.ways(mesh, over)
        axes = ("batch", "length", "hidden")
        # A decoder may have fewer rows than devices: then each device has all rows.
        rows = meshes.partition_if_divisible(
            mesh, dict(zip(axes, x_BTD.shape, strict=True))
        )
        is_split = rows[0] is not None

        def local(weights: Any, *tokens: Array) -> Array:
            first = jax.lax.axis_index(over) * here

            def own_part(_: None, part: tuple[Array, ...]) -> tuple[None, Array]:
                first_row, x, chosen, shares = part
                fixed = {"experts": here, "first_row": first_row}
                y = alone(compute, weights, x, chosen - first, shares, **fixed)
                return None, y

            if not is_split or alone_in_row:
                shard = jax.lax.axis_index(outer) if is_split else 0
                _, y = own_part(None, (shard * len(tokens[0]), *tokens))
                return jax.lax.psum(y, over)
            met = [jax.lax.all_gather(each, "expert", axis=0) for each in tokens]
            shards = jnp.arange(len(met[0])) + jax.lax.axis_index(outer) * len(met[0])
            parts = shards * len(tokens[0]), *met
            _, y = jax.lax.scan(jax.checkpoint(own_part), None, parts)
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0)
            return jax.lax.psum(y, "tensor")

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(over), rows, rows, rows),
            out_specs=rows,
            # Pallas kernels do not declare how their results vary over the mesh.
            check_vma=False,
        )(_narrowed(weights, x_BTD.dtype), x_BTD, chosen_BTC, shares_BTC)

    return mix


def _narrowed(weights: Any, dtype: Any) -> Any:
    """Matrices in the dtype of the product, in which `fsdp` then gathers them."""

    def narrow(x: Array) -> Array:
        is_matrix = x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_matrix else x

    return jax.tree.map(narrow, weights)
