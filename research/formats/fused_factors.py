"""Low-rank factors of one tensor of a file, which may hold several of our matrices.

Matrices that a file fuses have one A and one B there. Their ranks add up: A has the
rows of one matrix behind those of the other, and B is block-diagonal, which is exact.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from research.models.families.stored_tensor import StoredTensor
from research.weights.adapters.lora import KIND
from research.weights.parameter_spec import Spec

# The factors of one matrix: a `[*stack, *in, rank]` and b `[*stack, rank, *out]`, where
# `stack` are the stacking axes, such as that of experts, that its tensor has itself.
Pair = tuple[np.ndarray, np.ndarray]


def join_factors(
    stored: StoredTensor, pairs: Mapping[str, Pair], specs: Mapping[str, Spec]
) -> Pair:
    """A `[*stack, rank, in]` and B `[*stack, out, rank]` of a tensor.

    The outputs of B are in the order of the file. A matrix without factors stays as it
    is.

    Args:
      stored: the tensor.
      pairs: the factors of its matrices by path.
      specs: of the model.
    """
    stack = stored.shape(specs)[:-2]
    ranks = {path: b.shape[len(stack)] for path, (_, b) in pairs.items()}
    total, start = sum(ranks.values()), 0
    wide, rows, values = _outputs(stored, total, specs), [], []
    for path in stored.paths:
        outputs = wide[path].shape[wide[path].stacked + 1 :]
        value = np.zeros((*stack, total, *outputs), np.float32)
        if path in pairs:
            (a, b), end = pairs[path], start + ranks[path]
            rows.append(a.reshape(*stack, -1, ranks[path]).swapaxes(-1, -2))
            value[(*(slice(None) for _ in stack), slice(start, end))] = b
            start = end
        values.append(value)
    return np.concatenate(rows, -2), _by_rows(stored).pack(values, wide)


def split_factors(
    stored: StoredTensor, down: np.ndarray, up: np.ndarray, specs: Mapping[str, Spec]
) -> dict[str, Pair]:
    """The factors of each matrix of a tensor; undoes `join_factors`.

    A component that changes other matrices of the tensor, and not this one, is none of
    its factors. Neither is one of zeros alone, which pads a rank.
    """
    if down.ndim > 2:
        single = dataclasses.replace(stored, name=f"{stored.name}.{{}}")
        experts = zip(down, up, strict=True)
        parts = [split_factors(single, *each, specs) for each in experts]
        return {
            path: _stacked([part.get(path) for part in parts], specs[path])
            for path in stored.paths
            if any(path in part for part in parts)
        }
    wide = _outputs(stored, len(down), specs)
    ups = {path: _by_rows(stored).unpack(path, up, wide) for path in stored.paths}
    acts = {path: b.reshape(len(b), -1).any(1) for path, b in ups.items()}
    idle = ~np.any([*acts.values()], axis=0) & down.any(1)
    return {
        path: (
            down[acts[path] | idle].T.reshape(*specs[path].in_shape, -1),
            b[acts[path] | idle],
        )
        for path, b in ups.items()
        if (acts[path] | idle).any()
    }


def join_lengths(
    stored: StoredTensor, lengths: Mapping[str, np.ndarray], specs: Mapping[str, Spec]
) -> np.ndarray:
    """One number for each output of a tensor, `[out]`, from those of its matrices."""
    rows = [lengths[path][None] for path in stored.paths]
    return _by_rows(stored).pack(rows, _outputs(stored, 1, specs))[:, 0]


def split_lengths(
    stored: StoredTensor, value: np.ndarray, specs: Mapping[str, Spec]
) -> dict[str, np.ndarray]:
    """Undoes `join_lengths`: `[*out]` of each matrix."""
    rows, column = _by_rows(stored), value[:, None]
    wide = _outputs(stored, 1, specs)
    return {path: rows.unpack(path, column, wide)[0] for path in stored.paths}


def with_lengths(weight: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A weight `[*in, *out]` with outputs of these `lengths` `[*out]`, as in DoRA.

    A length of zero stands for an output that no adapter changes.
    """
    into = tuple(range(weight.ndim - lengths.ndim))
    norms = np.sqrt(np.sum(np.square(weight, dtype=np.float32), into))
    gains = lengths / np.maximum(norms, np.finfo(np.float32).tiny)
    return weight * np.where(lengths == 0, np.float32(1), gains)


def factor_shapes(
    stored: StoredTensor, rank: int, specs: Mapping[str, Spec]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B."""
    up = _by_rows(stored).shape(_outputs(stored, rank, specs))
    return (*up[:-2], rank, math.prod(specs[stored.paths[0]].in_shape)), up


def filled(pair: Pair | None, rank: int, spec: Spec, index: int = 0) -> Pair:
    """`pair` with zeros up to `rank`; None: zeros alone.

    `index` counts the stacking axes of `spec` that the pair does not have.
    """
    shapes = KIND.matrix_specs(spec, rank)
    a, b = (np.zeros(shapes[x].shape[index:], np.float32) for x in "ab")
    if pair is not None:
        own = pair[0].shape[-1]
        a[..., :own] = pair[0]
        b[(*[slice(None)] * (spec.stacked - index), slice(own))] = pair[1]
    return a, b


def without_idle(pair: Pair) -> Pair:
    """One matrix's `pair` without components that are zero in both factors.

    They pad ranks, change nothing, and get no gradient.
    """
    a, b = pair
    rank = len(b)
    used = a.reshape(-1, rank).any(0) | b.reshape(rank, -1).any(1)
    return a[..., used], b[used]


def update_of(pair: Pair, spec: Spec, scale: float) -> np.ndarray:
    """`scale` times the product of both factors, `[*stack, *in, *out]`."""
    (a, b), rank = pair, pair[0].shape[-1]
    inputs, outputs = spec.as_matrix.shape[-2:]
    product = a.reshape(-1, inputs, rank) @ b.reshape(-1, rank, outputs)
    shape = (*a.shape[:-1], *spec.shape[spec.stacked + spec.n_in :])
    return np.float32(scale) * product.reshape(shape)


def _stacked(pairs: list[Pair | None], spec: Spec) -> Pair:
    """Those of all experts, with zeros up to the largest rank of them."""
    rank = max(pair[0].shape[-1] for pair in pairs if pair is not None)
    each = [filled(pair, rank, spec, spec.stacked) for pair in pairs]
    return np.stack([a for a, _ in each]), np.stack([b for _, b in each])


def _by_rows(stored: StoredTensor) -> StoredTensor:
    # Both factors of other tools are `[out, in]`, also where the weight is not.
    return dataclasses.replace(stored, transposed=True)


def _outputs(
    stored: StoredTensor, rank: int, specs: Mapping[str, Spec]
) -> dict[str, Spec]:
    """Specs of the factors b of this rank."""
    return {path: KIND.matrix_specs(specs[path], rank)["b"] for path in stored.paths}
