"""Attention on a mesh: which queries a device computes, and which keys it gathers.

Rows are split over the batch axes, heads over `tensor`, and the tokens of a row over
`context`. Queries stay where they are. With a `context` axis each device gathers the
keys and values of its rows (Llama 3, arXiv:2407.21783, section 3.3.2), so attention is
exact and documents stay apart. With grouped heads, keys and values are a fraction of
the size of the queries.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from research.models.attention import PLAIN, ScoreRule, rule_partition
from research.models.attention_kernels import packed_attention
from research.parallel import mesh as meshes

Array = jax.Array
Attend = Callable[..., Array]


def make_attend(mesh: Mesh, kernel: str, block: int) -> Attend:
    """Makes `attend(q, k, v, segments, rule)`, causal within documents.

    Arrays are global. The last argument, a `ScoreRule`, may be omitted.

    `kernel` and `block` are those of `attention_kernels.packed_attention`.
    """

    def local(
        q: Array, k: Array, v: Array, segments: Array, rule: ScoreRule = PLAIN
    ) -> Array:
        offset: Array | int = 0
        k_segments = segments
        if mesh.shape["context"] > 1:
            offset = jax.lax.axis_index("context") * q.shape[1]
            k, v, k_segments = (
                jax.lax.all_gather(x, "context", axis=1, tiled=True)
                for x in (k, v, segments)
            )
        return packed_attention(
            q, k, v, segments, k_segments,
            kernel=kernel, block=block, offset=offset, rule=rule,
        )  # fmt: skip

    if mesh.size == 1:
        return local
    heads = meshes.partition(("batch", "length", "heads", "head_dim"))
    keys = meshes.partition(("batch", "length", "kv_heads", "head_dim"))
    rows: PartitionSpec = meshes.partition(("batch", "length"))

    def attend(*arrays: Any) -> Array:
        rules = [rule_partition(rule, heads[2]) for rule in arrays[4:]]
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, keys, keys, rows, *rules),
            out_specs=heads,
            # Pallas kernels do not declare how their results vary over the mesh.
            check_vma=False,
        )(*arrays)

    return attend
