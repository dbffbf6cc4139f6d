"""Next-token loss as (sum, count), its vocabulary head computed only where it counts.

The head is a large share of a small model (28 of 135 million parameters in
SmolLM2-135M), and in instruction data more than half of all positions have weight
zero. So positions with weight are gathered to the front and go through the head in
chunks, as many as the batch needs; logits of `[batch, seq, vocabulary]` never exist.
The gradient of a chunk is taken while its logits are at hand, so that nothing is
computed twice (the idea of Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.weights.contraction import contract
from research.weights.representations.leaf import Matrix

Array = jax.Array


def token_losses(
    hidden_CD: Array, head: Matrix, targets_C: Array
) -> tuple[Array, Array]:
    """Cross entropy of each target in nats and the log-normaliser, both float32."""
    logits = contract(hidden_CD, head).astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets_C[..., None], -1)[..., 0]
    return normalizer - picked, normalizer


def weighted_loss(
    hidden_BTD: Array,
    head: Matrix,
    targets_BT: Array,
    weights_BT: Array,
    groups_BT: Array,
    *,
    n_groups: int,
    chunk: int,
    shards: tuple[int, int] = (1, 1),
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """The objective, and the sum of weight times cross entropy of each group.

    Args:
      hidden_BTD: final hidden states.
      head: `[D, V]`.
      targets_BT: int32 ids.
      weights_BT: float32; positions with 0 never reach the head.
      groups_BT: int32 below `n_groups`, what each position is reported under.
      chunk: positions per head product and shard; bounds memory at
        `shards * chunk * V` logits.
      shards: into how many parts the mesh splits the batch, and each row. Positions
        are gathered within a part, so no hidden state crosses devices.
      z_loss: weight of the squared log-normaliser, which keeps logits from drifting
        (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    Returns:
      A float32 scalar to differentiate, the sum over all positions of weight times
      (cross entropy + z_loss * log-normaliser ** 2); and float32 `[n_groups]`, the
      cross entropies alone, which carry no gradient.
    """
    parts = _per_shard(shards, hidden_BTD, targets_BT, weights_BT, groups_BT)
    hidden, targets, weights, groups = parts
    return _head_loss(chunk, n_groups, z_loss)(hidden, head, targets, weights, groups)


def chunked_token_losses(
    hidden_BTD: Array,
    head: Matrix,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
    shards: tuple[int, int] = (1, 1),
) -> Array:
    """Cross entropy `[B, T]` where the weight is not zero, 0 elsewhere. No gradient."""
    hidden, targets, weights = _per_shard(shards, hidden_BTD, targets_BT, weights_BT)

    def visit(losses, index, hidden, targets, weights):
        found, _ = token_losses(hidden, head, targets)
        return _scatter(losses, index, found * (weights != 0))

    empty = jnp.zeros(weights.shape, jnp.float32)
    losses = _for_each_chunk(visit, empty, weights, (hidden, targets, weights), chunk)
    return _whole(shards, losses, weights_BT.shape)


def _per_shard(shards: tuple[int, int], *arrays: Array) -> tuple[Array, ...]:
    """`[B, T, ...]` to `[parts, positions of a part, ...]`: a split that moves no data.

    A part is one of `shards[0]` groups of rows and one of `shards[1]` stretches.
    """
    rows, stretches = shards

    def split(x: Array) -> Array:
        batch, length, *rest = x.shape
        x = x.reshape(rows, batch // rows, stretches, length // stretches, *rest)
        return x.swapaxes(1, 2).reshape(rows * stretches, -1, *rest)

    return tuple(map(split, arrays))


def _whole(shards: tuple[int, int], x: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_per_shard` for `[B, T]` of `shape`."""
    rows, stretches = shards
    x = x.reshape(rows, stretches, shape[0] // rows, shape[1] // stretches)
    return x.swapaxes(1, 2).reshape(shape)


def _for_each_chunk(visit, carry, weights, arrays, chunk):
    """Folds `visit(carry, index, *arrays)` over positions with weight.

    Inputs are `[shards, positions, ...]`, what `visit` gets is `[shards, chunk, ...]`.
    The trip count follows the fullest shard of this batch, not a worst case.
    """
    positions = weights.shape[1]
    chunk = min(chunk, positions)
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    # Past the end: gathers fill with zeros there, scatters drop.
    order = jnp.pad(order, ((0, 0), (0, -positions % chunk)), constant_values=positions)
    longest = jnp.max(jnp.sum(weights != 0, axis=1))

    def body(i, carry):
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk, axis=1)
        return visit(carry, index, *(_gather(x, index) for x in arrays))

    return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, body, carry)


@jax.vmap
def _gather(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


@jax.vmap
def _scatter(x, index, values):
    return x.at[index].set(values.astype(x.dtype), mode="drop", unique_indices=True)


def _chunk_loss(n_groups, z_loss, hidden, head, targets, weights, groups):
    """Of one chunk: the objective, and the cross entropies by group."""
    entropies, normalizers = token_losses(hidden, head, targets)
    member = jax.nn.one_hot(groups, n_groups)
    by_group = jnp.sum((entropies * weights)[..., None] * member, axis=(0, 1))
    objective = jnp.sum(entropies * weights)
    if z_loss:
        objective += z_loss * jnp.sum(normalizers**2 * weights)
    return objective, by_group


@functools.cache
def _head_loss(chunk: int, n_groups: int, z_loss: float) -> Any:
    """The loss with its own derivative rule, for one chunk size."""

    chunk_loss = functools.partial(_chunk_loss, n_groups, z_loss)

    def nothing():
        return jnp.zeros((), jnp.float32), jnp.zeros(n_groups, jnp.float32)

    @jax.custom_vjp
    def head_loss(hidden, head, targets, weights, groups):
        def visit(sums, index, hidden, *rest):
            return jax.tree.map(jnp.add, sums, chunk_loss(hidden, head, *rest))

        arrays = (hidden, targets, weights, groups)
        return _for_each_chunk(visit, nothing(), weights, arrays, chunk)

    def forward(hidden, head, *rest):
        # A frozen head (LoRA) is not perturbed: its [D, V] gradient is not formed.
        trained = [leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=_primal)]
        hidden, targets, weights, groups = (x.value for x in (hidden, *rest))
        leaves, structure = jax.tree.flatten(
            jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_primal)
        )
        pairs = list(zip(leaves, trained, strict=True))
        diff = [leaf for leaf, t in pairs if t]

        def visit(carry, index, hidden, *rest):
            sums, d_hidden, d_head = carry

            def of(hidden, diff):
                moved = iter(diff)
                full = [next(moved) if t else x for x, t in pairs]
                return chunk_loss(hidden, structure.unflatten(full), *rest)

            (loss, by_group), (dh, dw) = jax.value_and_grad(of, (0, 1), has_aux=True)(
                hidden, diff
            )
            sums = (sums[0] + loss, sums[1] + by_group)
            d_head = [x + y.astype(x.dtype) for x, y in zip(d_head, dw, strict=True)]
            return sums, _scatter(d_hidden, index, dh), d_head

        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in diff]
        carry = (nothing(), jnp.zeros_like(hidden), zeros)
        sums, d_hidden, d_head = _for_each_chunk(
            visit, carry, weights, (hidden, targets, weights, groups), chunk
        )
        moved = iter(d_head)
        d_head = [next(moved).astype(x.dtype) if t else None for x, t in pairs]
        return sums, (d_hidden, structure.unflatten(d_head))

    def backward(residuals, cotangents):
        d_hidden, d_head = jax.tree.map(
            lambda d: (d * cotangents[0]).astype(d.dtype), residuals
        )
        return d_hidden, d_head, None, None, None

    head_loss.defvjp(forward, backward, symbolic_zeros=True)
    return head_loss


def _primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
