"""Held-out loss, exact: sums over all tokens first, one division at the end."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results.

    Attributes:
      loss: nats per trained token over everything.
      by_category: the same per category; a category without tokens is left out.
      tokens: trained tokens per category.
    """

    loss: float
    by_category: dict[str, float]
    tokens: dict[str, int]


def evaluate(
    eval_fn: Callable[[Any], dict[str, Any]],
    batches: Sequence[Any],
    categories: Sequence[str],
) -> Evaluation:
    """Runs `eval_fn` (batch to per-category sums) over all batches."""
    loss = np.zeros(len(categories), np.float64)
    weight = np.zeros(len(categories), np.float64)
    # Dispatch all first, then read: a read waits for the device.
    for sums in [eval_fn(batch) for batch in batches]:
        loss += np.asarray(sums["loss"], np.float64)
        weight += np.asarray(sums["weight"], np.float64)
    seen = [i for i in range(len(categories)) if weight[i] > 0]
    return Evaluation(
        loss=float(loss.sum() / max(weight.sum(), 1.0)),
        by_category={categories[i]: float(loss[i] / weight[i]) for i in seen},
        tokens={categories[i]: int(weight[i]) for i in seen},
    )
