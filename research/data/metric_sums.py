"""An objective gives sums by name, and each is divided once, at the very end.

A loss, a metric and an evaluation are each a mean over something that no device, no
microbatch and no evaluation batch holds whole. So each travels as a numerator and a
denominator. The step, the log, the evaluation and the report take whatever names there
are: a task adds a metric by adding a name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.data.grouped_values import group_fields
from research.data.token_batch import Batch
from research.models.transformer import Model

Array = jax.Array


class Ratio(NamedTuple):
    """A mean before the division: two float32 scalars, or two arrays `[groups]`."""

    numerator: Array
    denominator: Array


Sums = dict[str, Ratio]


class Objective(Protocol):
    """The loss that a step differentiates, and the figures that it reports.

    Attributes:
      rows_per_unit: consecutive rows of a batch that form one unit, such as 2 for
        pairs; the batches of the task carry the same number.
      loss_unit: the unit of the loss, for people, such as "nats per trained token".
    """

    rows_per_unit: int
    loss_unit: str

    def train(
        self, model: Model, params: dict[str, Any], batch: Batch
    ) -> tuple[Array, Sums]:
        """The loss and the sums of one microbatch `[rows, seq]`.

        Returns:
          A float32 scalar to differentiate, a sum like the numerator of `loss` and
          divided by the same denominator; and the sums, among them `loss`, whose
          arrays are `[groups]`. The sums carry no gradient.
        """

    def evaluate(self, model: Model, params: dict[str, Any], batch: Batch) -> Sums:
        """The sums of held-out rows `[rows, seq]`, among them `loss`, `[groups]`."""


def require_units(objective: Objective, batch: Batch) -> None:
    """Raises ValueError for a batch that keeps another number of rows together."""
    wanted = objective.rows_per_unit
    if batch.rows_per_unit != wanted:
        raise ValueError(
            f"the objective compares {wanted} rows with each other and the batch "
            f"keeps {batch.rows_per_unit} together: set rows_per_unit of both"
        )


def evaluate_weights(
    objective: Objective, model: Model, weights: dict[str, Any], batch: Batch
) -> Sums:
    """The sums of one batch `[rows, seq]`, with the parameters of the whole model."""
    require_units(objective, batch)
    return objective.evaluate(model, weights, batch)


def sum_by_group(values: Array, groups: Array, n_groups: int) -> Array:
    """`values` of any shape summed into `[n_groups]` by the ids `groups`."""
    member = jax.nn.one_hot(groups, n_groups, axis=0)
    return jnp.sum(member * values[None], axis=range(1, member.ndim))


def inverse(count: Array) -> Array:
    """`1 / count`, and 0 where nothing was counted."""
    return jnp.where(count > 0, 1.0 / jnp.where(count > 0, count, 1.0), 0.0)


def mean(ratio: Ratio) -> Array:
    """A float32 scalar: over all groups, 0 where nothing was counted."""
    return jnp.sum(ratio.numerator) * inverse(jnp.sum(ratio.denominator))


def means_by_group(
    sums: Mapping[str, Ratio], groups: Sequence[str]
) -> dict[str, float]:
    """`{"loss/open_qa": mean, ...}`, the fields of `group_fields`.

    Has the names whose sums are `[groups]`, and of each the groups that were counted.
    The sums may have room for more groups: runs that train together share a width.
    """
    found: dict[str, float] = {}
    for name, ratio in sums.items():
        if np.ndim(ratio.denominator):
            parts = zip(groups, *map(np.asarray, ratio), strict=False)
            found |= group_fields(name, {g: float(a / b) for g, a, b in parts if b > 0})
    return found
