"""The losses of a model as plain values."""

from typing import Any

from research.data.grouped_values import NATS_PER_TOKEN
from research.evaluate.held_out_losses import Evaluation
from research.report.result_tables import perplexity


def as_json(found: Evaluation) -> dict[str, Any]:
    """The results of one model, as `evaluation.json` has them."""
    in_nats = found.loss_unit == NATS_PER_TOKEN

    def values(loss: float, tokens: int, bits: float | None) -> dict[str, Any]:
        line: dict[str, Any] = {"loss": loss, "tokens": tokens}
        if in_nats:
            line["perplexity"] = perplexity(loss)
        if bits is not None:
            line["bits_per_byte"] = bits
        return line

    whole = values(found.loss, sum(found.tokens.values()), found.bits_per_byte)
    return {
        **whole,
        "loss_unit": found.loss_unit,
        "metrics": found.metrics,
        "by_group": {
            group: values(loss, found.tokens[group], found.bits_by_group.get(group))
            for group, loss in found.by_group.items()
        },
    }
