"""Next-token loss as (sum, count), its vocabulary head computed only where it counts.

The head is a large share of a small model (28 of 135 million parameters in
SmolLM2-135M), and in instruction data more than half of all positions have weight
zero. So positions with weight are gathered to the front and go through the head in
chunks, as many as the batch needs; logits of `[batch, seq, vocabulary]` never exist.
The gradient of a chunk is taken while its logits are at hand, so that nothing is
computed twice (the idea of Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.config.run_config import Config
from research.data.grouped_values import NATS_PER_TOKEN
from research.data.metric_sums import Ratio, Sums, sum_by_group
from research.data.token_batch import Batch
from research.models.parts.experts import ExpertLoad
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.tasks.head_chunk import head_chunk
from research.weights.contraction import expand

Array = jax.Array
Params = dict[str, Any]
# As `Model.logits`: from the head and hidden states `[*batch, D]` to float32
# `[*batch, V]`.
Logits = Callable[[Any, Array], Array]
# Logits `[*batch, V]` and targets `[*batch]` to float32 `[*batch]`.
TokenValues = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The objective of next-token training, a `metric_sums.Objective`.

    Attributes:
      groups: how many groups the loss is reported by.
      chunk: see `weighted_loss`, as are the next two; 0: by `head_chunk`.
      shards: into how many parts the mesh splits the batch, and each row.
      z_loss: weight of the squared log-normaliser.
      balance_loss: weight of the loss that keeps the load of experts alike; below 0:
        that of the model.
      mesh: needed if `chunk` is 0.
    """

    groups: int
    chunk: int
    shards: tuple[int, int] = (1, 1)
    z_loss: float = 0.0
    mesh: Mesh | None = None
    balance_loss: float = -1.0
    rows_per_unit: int = 1
    loss_unit: str = NATS_PER_TOKEN

    @classmethod
    def of(cls, config: Config, mesh: Mesh, groups: int) -> "CrossEntropy":
        """The cross entropy by the knobs of `config`, for batches split over `mesh`."""
        optim, shards = config.optim, meshes.shards(mesh)
        return cls(
            groups,
            config.model.loss_chunk,
            shards,
            optim.z_loss,
            mesh,
            optim.balance_loss,
        )

    def train(self, model: Model, params: Params, batch: Batch) -> tuple[Array, Sums]:
        """The sum to differentiate; and `loss`, the cross entropies by group.

        A model with experts also gives the figures of `expert_sums`.
        """
        packed = (batch.tokens, batch.positions, batch.segments)
        hidden, load = model.hidden_and_load(params, *packed)
        objective, by_group = weighted_loss(
            model.logits,
            model.head(params),
            hidden,
            batch.targets,
            batch.weights,
            batch.groups,
            n_groups=self.groups,
            chunk=self.positions(model.architecture.vocab),
            shards=self.shards,
            z_loss=self.z_loss,
        )
        sums = {"loss": Ratio(by_group, self._counts(batch))}
        if load is not None:
            weight = self.balance_loss
            if weight < 0:
                weight = model.architecture.experts.balance_weight
            # A mean over tokens as the loss, so the sum counts it once for each.
            trained = jnp.sum(batch.weights)
            objective += weight * trained * load.balance_loss()
            sums |= jax.lax.stop_gradient(expert_sums(load, trained))
        return objective, sums

    def evaluate(self, model: Model, params: Params, batch: Batch) -> Sums:
        """`loss`: the cross entropies by group."""
        hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
        losses = chunked_token_values(
            cross_entropies,
            model.logits,
            model.head(params),
            hidden,
            batch.targets,
            batch.weights,
            chunk=self.positions(model.architecture.vocab),
            shards=self.shards,
        )
        by_group = sum_by_group(losses * batch.weights, batch.groups, self.groups)
        return {"loss": Ratio(by_group, self._counts(batch))}

    def positions(self, vocab: int) -> int:
        """The chunk for a model with so many ids."""
        return self.chunk or head_chunk(vocab, self.mesh)

    def _counts(self, batch: Batch) -> Array:
        return sum_by_group(batch.weights, batch.groups, self.groups)


def expert_sums(load: ExpertLoad, trained: Array) -> Sums:
    """How the router has spread a microbatch with `trained` tokens, as sums to divide.

    `balance_loss` is made of two means over the microbatch, so unlike the loss it
    depends on the size of one. `busiest_expert` is how many times an even share of the
    tokens the busiest expert of a layer got, as a mean over layers. `expert_load/e` is
    the share of all assignments that went to the experts numbered e.
    """
    by_layer = jnp.sum(load.assigned, axis=-1)
    experts = load.assigned.shape[-1]
    busiest = jnp.sum(jnp.max(load.assigned, axis=-1)) * experts
    total, assigned = jnp.sum(by_layer), jnp.sum(load.assigned, axis=0)
    return {
        "balance_loss": Ratio(load.balance_loss() * trained, trained),
        "busiest_expert": Ratio(busiest, total),
        **{f"expert_load/{e}": Ratio(assigned[e], total) for e in range(experts)},
    }


def token_losses(logits_CV: Array, targets_C: Array) -> tuple[Array, Array]:
    """Cross entropy of each target in nats and the log-normaliser, both float32."""
    normalizer = jax.nn.logsumexp(logits_CV, axis=-1)
    picked = jnp.take_along_axis(logits_CV, targets_C[..., None], -1)[..., 0]
    return normalizer - picked, normalizer


def cross_entropies(logits_CV: Array, targets_C: Array) -> Array:
    """The cross entropy of each target in nats, as `token_losses` has it."""
    return token_losses(logits_CV, targets_C)[0]


def weighted_loss(
    logits_of: Logits,
    head: Any,
    hidden_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    groups_BT: Array,
    *,
    n_groups: int,
    chunk: int,
    shards: tuple[int, int] = (1, 1),
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """The sum to differentiate, and the sum of weight times cross entropy by group.

    Args:
      logits_of: `Model.logits`; a hashable function.
      head: the pytree it takes: the vocabulary head, as `Model.head` gives it.
      hidden_BTD: final hidden states.
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
    head_loss = _head_loss(logits_of, chunk, n_groups, z_loss)
    head = expand(head, hidden.dtype)
    return head_loss(hidden, head, targets, weights, groups)


def chunked_token_values(
    values_of: TokenValues,
    logits_of: Logits,
    head: Any,
    hidden_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
    shards: tuple[int, int] = (1, 1),
) -> Array:
    """A value `[B, T]` of each logits where the weight is not zero, 0 elsewhere.

    Made chunk by chunk, so the memory is that of the loss. No gradient.

    Args:
      values_of: makes float32 `[C]` of the logits `[C, V]` and the targets `[C]`.
      logits_of: see `weighted_loss`, as are the others.
    """
    hidden, targets, weights = _per_shard(shards, hidden_BTD, targets_BT, weights_BT)
    head = expand(head, hidden.dtype)

    def visit(losses, number, index, hidden, targets, weights):
        found = values_of(logits_of(_keyed(head, number), hidden), targets)
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
    """Folds `visit(carry, number, index, *arrays)` over positions with weight.

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
        return visit(carry, i, index, *(_gather(x, index) for x in arrays))

    return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, body, carry)


@jax.vmap
def _gather(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


@jax.vmap
def _scatter(x, index, values):
    return x.at[index].set(values.astype(x.dtype), mode="drop", unique_indices=True)


def _keyed(head: Any, number: Array) -> Any:
    """`head` with random keys of its own for this chunk: each drops other inputs."""

    def one(leaf: Array) -> Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, number) if is_key else leaf

    return jax.tree.map(one, head)


def _chunk_loss(
    logits_of, n_groups, z_loss, number, hidden, head, targets, weights, groups
):
    """The sum to differentiate and the cross entropies by group, of one chunk."""
    head = _keyed(head, number)
    entropies, normalizers = token_losses(logits_of(head, hidden), targets)
    member = jax.nn.one_hot(groups, n_groups)
    by_group = jnp.sum((entropies * weights)[..., None] * member, axis=(0, 1))
    objective = jnp.sum(entropies * weights)
    if z_loss:
        objective += z_loss * jnp.sum(normalizers**2 * weights)
    return objective, by_group


# One function for each set of arguments, or every call would be compiled anew.
@functools.lru_cache(maxsize=32)
def _head_loss(logits_of: Logits, chunk: int, n_groups: int, z_loss: float) -> Any:
    """The loss with its own derivative rule, for one chunk size."""

    chunk_loss = functools.partial(_chunk_loss, logits_of, n_groups, z_loss)

    def nothing():
        return jnp.zeros((), jnp.float32), jnp.zeros(n_groups, jnp.float32)

    @jax.custom_vjp
    def head_loss(hidden, head, targets, weights, groups):
        def visit(sums, number, index, hidden, *rest):
            found = chunk_loss(number, hidden, head, *rest)
            return jax.tree.map(jnp.add, sums, found)

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

        def visit(carry, number, index, hidden, *rest):
            sums, d_hidden, d_head = carry

            def of(hidden, diff):
                moved = iter(diff)
                full = [next(moved) if t else x for x, t in pairs]
                return chunk_loss(number, hidden, structure.unflatten(full), *rest)

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
