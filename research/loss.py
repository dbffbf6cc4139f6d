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

from research.matrix import Matrix, contract

Array = jax.Array


def token_losses(hidden_CD: Array, head: Matrix, targets_C: Array) -> Array:
    """Cross entropy of each target in nats, float32, shape of `targets_C`."""
    logits = contract(hidden_CD, head).astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return normalizer - jnp.take_along_axis(logits, targets_C[..., None], -1)[..., 0]


def weighted_loss(
    hidden_BTD: Array,
    head: Matrix,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
    shards: int = 1,
) -> Array:
    """Sum over positions of weight times cross entropy, a float32 scalar.

    Args:
      hidden_BTD: final hidden states.
      head: `[D, V]`.
      targets_BT: int32 ids.
      weights_BT: float32; positions with 0 never reach the head.
      chunk: positions per head product and shard; bounds memory at
        `shards * chunk * V` logits.
      shards: into how many parts the mesh splits the batch. Positions are gathered
        within a part, so no hidden state crosses devices.
    """
    hidden, targets, weights = _per_shard(shards, hidden_BTD, targets_BT, weights_BT)
    return _head_loss(chunk)(hidden, head, targets, weights)


def chunked_token_losses(
    hidden_BTD: Array,
    head: Matrix,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
    shards: int = 1,
) -> Array:
    """Cross entropy `[B, T]` where the weight is not zero, 0 elsewhere. No gradient."""
    hidden, targets, weights = _per_shard(shards, hidden_BTD, targets_BT, weights_BT)

    def visit(losses, index, hidden, targets, weights):
        found = token_losses(hidden, head, targets) * (weights != 0)
        return _scatter(losses, index, found)

    empty = jnp.zeros(weights.shape, jnp.float32)
    losses = _for_each_chunk(visit, empty, hidden, targets, weights, chunk)
    return losses.reshape(weights_BT.shape)


def _per_shard(shards: int, *arrays: Array) -> tuple[Array, ...]:
    """`[B, T, ...]` to `[shards, B / shards * T, ...]`: a split that moves no data."""
    return tuple(
        x.reshape(shards, x.shape[0] // shards * x.shape[1], *x.shape[2:])
        for x in arrays
    )


def _for_each_chunk(visit, carry, hidden, targets, weights, chunk):
    """Folds `visit(carry, index, hidden, targets, weights)` over weighted positions.

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
        return visit(
            carry, index, *(_gather(x, index) for x in (hidden, targets, weights))
        )

    return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, body, carry)


@jax.vmap
def _gather(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


@jax.vmap
def _scatter(x, index, values):
    return x.at[index].set(values.astype(x.dtype), mode="drop", unique_indices=True)


@functools.cache
def _head_loss(chunk: int) -> Any:
    """The loss with its own derivative rule, for one chunk size."""

    def chunk_loss(hidden, head, targets, weights):
        return jnp.sum(token_losses(hidden, head, targets) * weights)

    @jax.custom_vjp
    def head_loss(hidden, head, targets, weights):
        def visit(total, index, *parts):
            hidden, targets, weights = parts
            return total + chunk_loss(hidden, head, targets, weights)

        zero = jnp.zeros((), jnp.float32)
        return _for_each_chunk(visit, zero, hidden, targets, weights, chunk)

    def forward(hidden, head, targets, weights):
        # A frozen head (LoRA) is not perturbed: its [D, V] gradient is not formed.
        trained = [leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=_primal)]
        hidden, targets, weights = hidden.value, targets.value, weights.value
        leaves, structure = jax.tree.flatten(
            jax.tree.map(lambda leaf: leaf.value, head, is_leaf=_primal)
        )
        pairs = list(zip(leaves, trained, strict=True))
        diff = [leaf for leaf, t in pairs if t]

        def visit(carry, index, hidden, targets, weights):
            total, d_hidden, d_head = carry

            def of(hidden, diff):
                moved = iter(diff)
                full = [next(moved) if t else x for x, t in pairs]
                return chunk_loss(hidden, structure.unflatten(full), targets, weights)

            loss, (dh, dw) = jax.value_and_grad(of, (0, 1))(hidden, diff)
            d_head = [x + y.astype(x.dtype) for x, y in zip(d_head, dw, strict=True)]
            return total + loss, _scatter(d_hidden, index, dh), d_head

        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in diff]
        carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(hidden), zeros)
        total, d_hidden, d_head = _for_each_chunk(
            visit, carry, hidden, targets, weights, chunk
        )
        moved = iter(d_head)
        d_head = [next(moved).astype(x.dtype) if t else None for x, t in pairs]
        return total, (d_hidden, structure.unflatten(d_head))

    def backward(residuals, cotangent):
        d_hidden, d_head = jax.tree.map(
            lambda d: (d * cotangent).astype(d.dtype), residuals
        )
        return d_hidden, d_head, None, None

    head_loss.defvjp(forward, backward, symbolic_zeros=True)
    return head_loss


def _primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
