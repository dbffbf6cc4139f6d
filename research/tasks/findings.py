"""The findings that the doctor and the tasks report before a run starts, as data."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from research.tokenize.lost_text import LostText

if TYPE_CHECKING:
    from research.data.token_batch import Batch

NOT_EVALUATED = "no held-out losses and no best checkpoint"
# Bits per byte say little of a text of which more is lost; a run of one stops.
TOLERATED_LOSS, WORST_LOSS = 0.001, 0.5
# The finding whose text is the one system text that all rows have.
SYSTEM = "system text"
# The finding whose numbers count what was dropped or cut, by reason.
DROPPED = "dropped"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact that was checked, or only stated, before the first step.

    `dataclasses.asdict` gives an entry of `findings` in `doctor.json`.

    Attributes:
      name: what was checked, a few words.
      text: the result for people; may have several lines.
      ok: False stops the run.
      remedy: what the user should do where `ok` is False.
      numbers: the figures that `text` states, by name, for programs.
      warns: a user should look at it, though it may be meant.
    """

    name: str
    text: str
    ok: bool = True
    remedy: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warns: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Finding":
        """Undoes `dataclasses.asdict`."""
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class MaskCount:
    """Counts over the loss mask of built batches.

    Attributes:
      real: positions that hold a token.
      trained: those of them whose prediction counts in the loss.
      documents: documents.
      ends: documents whose last prediction is a trained stop id.
    """

    real: int
    trained: int
    documents: int
    ends: int


def count_mask(batches: Iterable["Batch"], stop_ids: frozenset[int]) -> MaskCount:
    """Counts the batches that training will see, not the rows they were made from."""
    real = trained = documents = ends = 0
    stops = list(stop_ids)
    for batch in batches:
        following = np.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
        last = (batch.segments > 0) & (batch.segments != following)
        stopped = np.isin(batch.targets, stops) & (batch.weights > 0)
        real += int((batch.segments > 0).sum())
        trained += int((batch.weights > 0).sum())
        documents += int(last.sum())
        ends += int((last & stopped).sum())
    return MaskCount(real, trained, documents, ends)


def examine_lost_text(lost: Mapping[str, LostText], *, bits_per_byte: bool) -> Finding:
    """Which share of each text is lost on the way to ids and back.

    `bits_per_byte`: whether they are reported of texts that are whole.
    """
    whole = sum(found.total for found in lost.values())
    parts = [
        f"{found.share:.2%} of {name} is lost, most often {', '.join(found.letters)}"
        for name, found in lost.items()
        if found.lost
    ]
    text = "; ".join(parts) or f"all of {whole:,} bytes comes back from the ids"
    without = [name for name, found in lost.items() if found.share > TOLERATED_LOSS]
    if without and bits_per_byte:
        text += f"; no bits per byte are given for {', '.join(without)}"
    return Finding(
        "tokenizer round trip",
        text,
        ok=all(found.share <= WORST_LOSS for found in lost.values()),
        remedy="the tokenizer does not know most of this text: choose another one",
        numbers={f"lost {name}": found.share for name, found in lost.items()},
    )
