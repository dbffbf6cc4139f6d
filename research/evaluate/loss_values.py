"""The losses of several models on the same rows, and of one as plain values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.data.grouped_values import NATS_PER_TOKEN
from research.evaluate.held_out_losses import Evaluation
from research.evaluate.measuring.row_losses import RowSums, group_rows
from research.evaluate.statistics.measured import Measured, ratio
from research.report.result_tables import perplexity

LOSS, BITS = LOSSES = ("loss", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class CommonLosses:
    """The losses of several models, on the rows of which every one has a loss.

    Two means say nothing about each other where one of them has other rows.

    Attributes:
      sums: of each row, by model; all models have the same rows.
      text_bytes: UTF-8 bytes by row that count in the loss, of answers or of a text.
      unit: of the losses.
    """

    sums: Mapping[str, Mapping[str, RowSums]]
    text_bytes: Mapping[str, int]
    unit: str

    @classmethod
    def of(
        cls,
        sums: Mapping[str, Mapping[str, RowSums]],
        text_bytes: Mapping[str, int],
        unit: str,
    ) -> "CommonLosses":
        """Keeps the rows that all models have.

        Raises:
          UserError: there is none, though each model has losses.
        """
        first, *others = sums.values()
        rows = [row for row in first if all(row in each for each in others)]
        if not rows and any(sums.values()):
            raise UserError(
                f"no row has a loss of all of {', '.join(sums)}, since some are too "
                "long for each data.seq_len: evaluate them one by one"
            )
        common = {k: {row: own[row] for row in rows} for k, own in sums.items()}
        return cls(common, text_bytes, unit)

    def __bool__(self) -> bool:
        """Whether there is a loss at all: rows without a reference have none."""
        return any(self.sums.values())

    @property
    def compared(self) -> str:
        """By which loss the models can be compared; "" if by none.

        A loss per token compares models that count the same tokens. Another tokenizer
        or template counts others, while the bytes of the answers stay the same.
        """
        if not self:
            return ""
        counts = {
            tuple(each[LOSS][1] for each in own.values()) for own in self.sums.values()
        }
        if len(counts) == 1:
            return LOSS
        return BITS if self.unit == NATS_PER_TOKEN else ""

    def measure(self, model: str, rows: Sequence[str]) -> dict[str, Measured]:
        """The loss that is compared, by its name, of `rows`."""
        name, own = self.compared, self.sums[model]
        pairs = [tuple(own[row][LOSS]) if row in own else (0.0, 0.0) for row in rows]
        if name == BITS:
            pairs = [
                (loss / math.log(2), float(self.text_bytes[row] if tokens else 0))
                for row, (loss, tokens) in zip(rows, pairs, strict=True)
            ]
        return {name: ratio(*zip(*pairs, strict=True))} if name else {}

    def group(self, model: str, labels: Mapping[str, str]) -> Evaluation:
        """The means of a model over all rows, and over those of each label."""
        own = self.sums[model]
        in_nats = self.unit == NATS_PER_TOKEN
        text_bytes = [self.text_bytes[row] * in_nats for row in own]
        found = [labels[row] for row in own]
        return group_rows([*own.values()], found, text_bytes, self.unit)


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
