"""How far files may be from the model that they hold, by the numbers in them."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ParityLimits:
    """The largest differences that rounding explains.

    A difference of arrays is the norm of their difference over the norm of the model's
    own. It is 1.4 where they have nothing to do with each other, so every limit on
    weights finds a tensor in the wrong place, order or scale.

    Attributes:
      weights: of one layer of a parameter.
      logits: of all logits, each position's mean taken off.
      kl: mean Kullback-Leibler divergence, in nats a token.
    """

    weights: float
    logits: float
    kl: float


# A weight in float32 is the same number, or a sum in another order. float16 rounds by
# up to 2**-11, bfloat16 by 2**-9. Q8_0 and Q4_0 round 32 numbers by up to half a step
# of 1/127 and 1/8 of the largest; at worst, with one large number among 32, that is
# 0.0223 of their norm, and 0.2 for Q4_0. Layers add their roundings up: in random
# models, logits differ by 20 to 30 times as much as weights, and in trained ones less.
# The limits of logits are above that, and say little for Q4_0.
LIMITS: Mapping[str, ParityLimits] = {
    "float32": ParityLimits(weights=1e-6, logits=1e-3, kl=1e-5),
    "float16": ParityLimits(weights=6e-4, logits=2e-2, kl=1e-3),
    "bfloat16": ParityLimits(weights=3e-3, logits=0.15, kl=3e-2),
    "q8_0": ParityLimits(weights=2.5e-2, logits=0.4, kl=0.1),
    "q4_0": ParityLimits(weights=0.25, logits=1.3, kl=2.0),
}


@dataclasses.dataclass(frozen=True)
class Parity:
    """The measures on some rows of tokens.

    Attributes:
      rows: which rows they are.
      tokens: how many tokens were compared.
      numbers: those in the files, a key of `LIMITS`.
      weights: the largest difference of a layer of a parameter; see `ParityLimits`.
      worst: path of that parameter.
      logits: difference of the logits; see `ParityLimits`.
      largest: the largest absolute difference of two logits.
      kl, largest_kl: divergence of the files from the model, nats a token.
      agreement: share of tokens after which both find the same next one likeliest.
    """

    rows: str
    tokens: int
    numbers: str
    weights: float
    worst: str
    logits: float
    largest: float
    kl: float
    largest_kl: float
    agreement: float

    @property
    def limits(self) -> ParityLimits:
        return LIMITS[self.numbers]

    def faults(self) -> list[str]:
        """The measures that are beyond their limits, or not a number."""
        measured = {
            f"the weights of {self.worst}": (self.weights, self.limits.weights),
            "the logits": (self.logits, self.limits.logits),
            "the divergence": (self.kl, self.limits.kl),
        }
        return [
            f"{name} {found:.2g} (limit {limit:g})"
            for name, (found, limit) in measured.items()
            if not found <= limit  # Also where it is not a number.
        ]

    def sentence(self) -> str:
        """The result in one line."""
        return (
            f"{self.tokens} tokens of {self.rows}: largest difference of logits "
            f"{self.largest:.1e}, KL {self.kl:.1e} nats a token, the likeliest token "
            f"agrees at {self.agreement:.1%}"
        )

    def facts(self) -> dict[str, Any]:
        """The content of `parity.json`."""
        return dataclasses.asdict(self) | {"limits": dataclasses.asdict(self.limits)}
