"""Held-out results, exact: sums over all batches first, one division at the end."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from research.data.grouped_values import NATS_PER_TOKEN, group_fields
from research.data.metric_sums import Sums, means_by_group

T = TypeVar("T")
AHEAD = 16  # batches that are dispatched before the first of them is read


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results.

    Attributes:
      loss: mean over everything, in `loss_unit`.
      by_group: the same per group; a group that was not counted is missing.
      tokens: the denominator of each group's loss: trained tokens, or another count
        where `loss_unit` names another.
      bits_per_byte: bits per UTF-8 byte of text, which does not depend on the
        tokenizer; None where the held-out rows are not whole texts.
      bits_by_group: the same per group.
      metrics: the other means of the objective by name, None where nothing was
        counted; and the same by group, as `grouped_values.group_fields` names them.
      loss_unit: the unit of the loss, as the objective gives it.
    """

    loss: float
    by_group: dict[str, float]
    tokens: dict[str, int]
    bits_per_byte: float | None = None
    bits_by_group: dict[str, float] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss_unit: str = NATS_PER_TOKEN

    def line(self) -> dict[str, Any]:
        """The fields of metrics.jsonl.

        Raises:
          ValueError: a metric has the name of another field.
        """
        line = {
            "loss": self.loss,
            "loss_unit": self.loss_unit,
            **group_fields("loss", self.by_group),
            **group_fields("tokens", self.tokens),
            **group_fields("bits_per_byte", self.bits_by_group),
        }
        if self.bits_per_byte is not None:
            line["bits_per_byte"] = self.bits_per_byte
        if self.means:  # For those who read the line without the task.
            line["metrics"] = ",".join(self.means)
        return add_metrics(line, self.metrics)

    @property
    def means(self) -> dict[str, float | None]:
        """The metrics over everything, without those by group."""
        return {name: x for name, x in self.metrics.items() if "/" not in name}


def add_metrics(line: dict[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`line` with the metrics of an objective.

    Raises:
      ValueError: a metric has the name of another field.
    """
    fields, names = ({x.partition("/")[0] for x in found} for found in (line, metrics))
    if taken := fields & names:
        raise ValueError(
            f"the objective has a metric named {', '.join(sorted(taken))}, which "
            "metrics.jsonl uses for something else: rename it"
        )
    return line | dict(metrics)


def sum_batches(
    sums_of: Callable[[Any], T],
    batches: Iterable[Any],
    sign_of_life: Callable[[], None] = lambda: None,
) -> list[T]:
    """The sums of each batch, on the host; `sign_of_life` is called after each."""
    found = []
    for sums in each_sum(sums_of, batches):
        found.append(sums)
        sign_of_life()
    return found


def each_sum(sums_of: Callable[[Any], T], batches: Iterable[Any]) -> Iterator[T]:
    """Yields the sums of each batch, on the host, as soon as they are there."""
    waiting: collections.deque[T] = collections.deque()
    # A read waits for the device, so batches are dispatched some way ahead of it.
    for batch in batches:
        waiting.append(sums_of(batch))
        if len(waiting) > AHEAD:
            yield jax.tree.map(np.asarray, waiting.popleft())
    while waiting:
        yield jax.tree.map(np.asarray, waiting.popleft())


def add_up(
    batches: Sequence[Sums],
    groups: Sequence[str],
    text_bytes: Mapping[str, int],
    loss_unit: str = NATS_PER_TOKEN,
) -> Evaluation:
    """Adds the named sums of all batches up, and divides once.

    Args:
      batches: at least one; their arrays are NumPy's.
      groups: names of the groups; sums may have room for more.
      text_bytes: bytes of the held-out text by group, or nothing.
      loss_unit: see `Evaluation`.
    """
    total = jax.tree.map(
        lambda *parts: functools.reduce(np.add, map(np.float64, parts)), *batches
    )
    loss, weight = total["loss"]
    seen = [i for i in range(len(groups)) if weight[i] > 0]
    bits = {
        groups[i]: float(loss[i] / math.log(2) / text_bytes[groups[i]])
        for i in seen
        if text_bytes.get(groups[i])
    }
    in_text = sum(text_bytes[name] for name in bits)
    of_text = [i < len(groups) and groups[i] in bits for i in range(len(loss))]
    others = {name: pair for name, pair in total.items() if name != "loss"}
    metrics = {name: _mean(*pair) for name, pair in others.items()}
    return Evaluation(
        loss=_mean(loss, weight) or 0.0,
        by_group={groups[i]: float(loss[i] / weight[i]) for i in seen},
        tokens={groups[i]: int(weight[i]) for i in seen},
        bits_per_byte=float(loss.sum(where=of_text) / math.log(2) / in_text)
        if in_text
        else None,
        bits_by_group=bits,
        metrics=metrics | means_by_group(others, groups),
        loss_unit=loss_unit,
    )


def _mean(numerator: np.ndarray, denominator: np.ndarray) -> float | None:
    count = denominator.sum()
    return float(numerator.sum() / count) if count > 0 else None
