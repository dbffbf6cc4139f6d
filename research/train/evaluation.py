"""Held-out loss, exact: sums over all tokens first, one division at the end."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out results.

    Attributes:
      loss: nats per trained token over everything.
      by_group: the same per group; a group without tokens is left out.
      tokens: trained tokens per group.
      bits_per_byte: bits per UTF-8 byte of text, which does not depend on the
        tokenizer; None where the held-out rows are not whole texts.
      bits_by_group: the same per group.
    """

    loss: float
    by_group: dict[str, float]
    tokens: dict[str, int]
    bits_per_byte: float | None = None
    bits_by_group: dict[str, float] = dataclasses.field(default_factory=dict)


def evaluate(
    eval_fn: Callable[[Any], dict[str, Any]],
    batches: Sequence[Any],
    groups: Sequence[str],
    text_bytes: Mapping[str, int],
    sign_of_life: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Runs `eval_fn` (batch to sums by group) over all batches.

    `text_bytes` are the bytes of the held-out text by group, or nothing;
    `sign_of_life` is called after each batch.
    """
    loss = np.zeros(len(groups), np.float64)
    weight = np.zeros(len(groups), np.float64)
    # Dispatch all first, then read: a read waits for the device.
    for sums in [eval_fn(batch) for batch in batches]:
        loss += np.asarray(sums["loss"], np.float64)
        weight += np.asarray(sums["weight"], np.float64)
        sign_of_life()
    seen = [i for i in range(len(groups)) if weight[i] > 0]
    bits = {
        groups[i]: float(loss[i] / math.log(2) / text_bytes[groups[i]])
        for i in seen
        if text_bytes.get(groups[i])
    }
    total = sum(text_bytes[name] for name in bits)
    return Evaluation(
        loss=float(loss.sum() / max(weight.sum(), 1.0)),
        by_group={groups[i]: float(loss[i] / weight[i]) for i in seen},
        tokens={groups[i]: int(weight[i]) for i in seen},
        bits_per_byte=float(loss.sum() / math.log(2) / total) if total else None,
        bits_by_group=bits,
    )
