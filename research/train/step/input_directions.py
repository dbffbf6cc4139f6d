"""The directions in which the inputs of matrices vary most, over a run's first batches.

Subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4) on the covariance
of a matrix's inputs, which is never formed: each round sends the batches through the
model and adds up x (x Q) for a basis Q `[in, k]`. So what is kept is of the size of the
adapters, and lies over the mesh as they do.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UserError
from research.data.token_batch import Batch
from research.train.step.train_step import StepDefinition
from research.weights.adapters.measured_inputs import InputDirections
from research.weights.parameter_spec import Spec
from research.weights.representations.observed_inputs import InputSums, ObservedInputs

Array = jax.Array
Params = dict[str, Any]
ROUNDS = 4
SPARE = 10  # Directions beyond those that are kept.


def measure_directions(
    definition: StepDefinition,
    frozen: Params,
    batches: Sequence[Batch],
    adapters: Mapping[str, Mapping[str, Spec]],
) -> dict[str, InputDirections]:
    """As many directions as the kind of the adapters wants for their ranks, by path.

    Args:
      definition: of the step; its model computes in evaluation, without noise.
      frozen: the base.
      batches: on the devices, `[microbatch, rows, seq]`.
      adapters: the specs of the factors by path.

    Raises:
      UserError: no token of the batches counts.
    """
    kind, wanted, width = definition.trainable.kind, {}, {}
    counts = _is_trained if kind.of_trained_tokens else _is_real
    count = sum(map(jax.jit(lambda batch: jnp.sum(counts(batch))), batches))
    if not int(count):
        raise UserError(
            f"no token of the run's first {len(batches)} batches is trained, and "
            "adapters start from the inputs of those that are: raise "
            "--config.lora.eva_batches or --config.data.seq_len"
        )
    # The basis of one factor A: its own axes, but with the spare directions.
    for path, factors in adapters.items():
        inputs, rank = factors["a"].as_matrix.shape[-2:]
        wanted[path] = min(kind.directions(rank), inputs)
        width[path] = min(wanted[path] + SPARE, inputs)
    basis = jax.jit(functools.partial(_drawn, adapters, width))()
    sums = jax.jit(functools.partial(_sums, definition, counts))
    turn = jax.jit(functools.partial(_turned, kind.about_mean))
    for last in (False,) * ROUNDS + (True,):
        total = None
        for batch in batches:
            own = sums(frozen, basis, batch)
            total = own if total is None else jax.tree.map(jnp.add, total, own)
        if not last:
            basis = turn(basis, total, count)
    best = functools.partial(_directions, wanted, kind.about_mean)
    return jax.jit(best)(basis, total, count)


def _drawn(
    adapters: Mapping[str, Mapping[str, Spec]], width: Mapping[str, int]
) -> dict[str, Array]:
    """Random orthonormal bases, the same for every run."""
    found = {}
    for number, (path, factors) in enumerate(adapters.items()):
        *stack, inputs, _ = factors["a"].as_matrix.shape
        key = jax.random.fold_in(jax.random.key(0), number)
        drawn = jax.random.normal(key, (*stack, inputs, width[path]), jnp.float32)
        found[path] = jnp.linalg.qr(drawn)[0]
    return found


def _is_trained(batch: Batch) -> Array:
    """Whether each input token is itself a trained target, as PEFT's label mask says.

    Labels of Hugging Face lie on the tokens themselves, and our weights on the token
    before. The first token of a document or row is no target here: it counts if the
    next one does.
    """
    weights = batch.weights
    before = jnp.concatenate([weights[..., :1], weights[..., :-1]], -1)
    own = jnp.where(batch.positions == 0, weights, before)
    return (own > 0) & _is_real(batch)


def _is_real(batch: Batch) -> Array:
    return batch.segments != 0


def _sums(
    definition: StepDefinition,
    counts: Callable[[Batch], Array],
    frozen: Params,
    basis: dict[str, Array],
    batch: Batch,
) -> dict[str, InputSums]:
    """The sums over the tokens of one batch."""

    def add(found: dict[str, InputSums], part: Batch) -> tuple[Any, None]:
        def run(sums: dict[str, InputSums]) -> Array:
            seen = counts(part).astype(jnp.float32)
            observed = {
                path: ObservedInputs(
                    frozen[path],
                    own,
                    sums[path],
                    jnp.broadcast_to(seen, (*own.shape[:-2], *seen.shape)),
                )
                for path, own in basis.items()
            }
            hidden = definition.model.hidden(
                dict(frozen) | observed, part.tokens, part.positions, part.segments
            )
            return jnp.sum(hidden.astype(jnp.float32))

        own = jax.grad(run)({path: InputSums.zeros(x) for path, x in basis.items()})
        return jax.tree.map(jnp.add, found, own), None

    start = {path: InputSums.zeros(x) for path, x in basis.items()}
    return jax.lax.scan(add, start, batch)[0]


def _along(basis: Array, sums: InputSums, count: Array, about_mean: bool) -> Array:
    """The product of the covariance (times the count) with the basis, `[.., in, k]`.

    Not about the mean, it is that of the second moment.
    """
    if not about_mean:
        return sums.products
    mean = sums.total / count
    off = jnp.einsum("...i,...ik->...k", sums.total, basis, precision="highest")
    return sums.products - mean[..., None] * off[..., None, :]


def _turned(
    about_mean: bool,
    basis: dict[str, Array],
    sums: dict[str, InputSums],
    count: Array,
) -> dict[str, Array]:
    """Bases nearer to the largest directions, orthonormal."""
    return {
        path: jnp.linalg.qr(_along(own, sums[path], count, about_mean))[0]
        for path, own in basis.items()
    }


def _directions(
    wanted: Mapping[str, int],
    about_mean: bool,
    basis: dict[str, Array],
    sums: dict[str, InputSums],
    count: Array,
) -> dict[str, InputDirections]:
    """The best directions within each basis (Rayleigh and Ritz)."""
    found = {}
    for path, own in basis.items():
        along = _along(own, sums[path], count, about_mean)
        inner = jnp.einsum("...ik,...il->...kl", own, along, precision="highest")
        sizes, turns = jnp.linalg.eigh((inner + jnp.swapaxes(inner, -1, -2)) / 2)
        sizes, turns = sizes[..., ::-1], turns[..., ::-1]  # The largest comes first.
        whole = jnp.einsum("...ik,...kl->...il", own, turns, precision="highest")
        # Directions have no sign: the largest part of each is positive.
        largest = jnp.argmax(jnp.abs(whole), -2, keepdims=True)
        whole *= jnp.sign(jnp.take_along_axis(whole, largest, -2))
        variance = sums[path].squares
        if about_mean:
            mean = sums[path].total / count
            variance -= jnp.sum(sums[path].total * mean, -1)
        most = wanted[path]
        shares = jnp.maximum(sizes[..., :most], 0) / variance[..., None]
        found[path] = InputDirections(whole[..., :most], shares)
    return found
