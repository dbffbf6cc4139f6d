"""The measures of a proof, and their limits.

Two limits hold for all kinds of numbers. Every stored number must be the one that
rounding gives, so a lost adapter, an exchanged tensor or a scale shows in any kind.
Logits are held against those of the run's own model with the same rounding, so a wrong
setting shows beside any rounding. Where files round nothing, the largest difference of
two logits and the divergence have a limit, too; then two models can only disagree on
the likeliest token where its rival is as near.
"""

import dataclasses
from typing import Any

# Logits of the same model differ by so much in float32: sums in another order.
FLOOR = 1e-3
# A share of the change that rounding, or an adapter, makes in logits. An adapter at
# 1.1 times its scale is beyond it, and so is a setting that changes as much as that.
SHARE = 0.05
# In float32: of two logits, and that as a share of the largest where this is more; and
# of divergence, nats a token.
LARGEST, OF_PEAK, KL = 1e-3, 1e-4, 1e-3
# Less of what adapters add than this, and rounding has undone the training.
MUCH = 0.9


@dataclasses.dataclass(frozen=True)
class Parity:
    """The measures on some rows of tokens.

    The difference of two models at a token is the norm of that of its logits, each
    model's mean taken off, over the norm of the run's own.

    Attributes:
      rows: which rows they are.
      tokens: how many tokens were compared.
      numbers: the least exact in the files, such as `bfloat16` or `q8_0`.
      architecture: the differences of the files' settings from the run's, each with
        the reason why it changes nothing; empty where all fields are equal.
      weights: the largest difference of a stored number from the run's, as a share of
        what rounding to nearest can explain; 1 is the limit.
      worst: path of the parameter with that number.
      update: where files hold adapters, the largest difference of one layer's update,
        as a share of its norm; None where they are merged.
      kept: share of the merged adapters' updates that is left after rounding: 1 for
        all of it, 0 for none; None where nothing is merged.
      least_kept: path of the matrix with the smallest such share; "" without any.
      logits: difference of the files from the run's model with the same rounding, at
        the median token.
      logits_limit: `FLOOR` and `SHARE` of `changed`.
      changed: difference that the rounding makes, at the median token; or the adapters,
        where the files hold them alone.
      largest: the largest absolute difference of two logits, files from run.
      kl, largest_kl: divergence of the files from the run, nats a token.
      agreement: share of tokens after which both find the same next one likeliest.
      peak: the largest logit of the run that is its token's likeliest.
      experts: whether the model chooses experts, and may choose another of two that are
        as good after a sum in another order. Single logits then have no limit.
    """

    rows: str
    tokens: int
    numbers: str
    architecture: tuple[str, ...]
    weights: float
    worst: str
    update: float | None
    kept: float | None
    least_kept: str
    logits: float
    changed: float
    largest: float
    kl: float
    largest_kl: float
    agreement: float
    peak: float = 0.0
    experts: bool = False

    @property
    def logits_limit(self) -> float:
        return FLOOR + SHARE * self.changed

    @property
    def limits(self) -> dict[str, float]:
        """By measure; fewer where a setting is said to change nothing but noise."""
        limits = {"weights": 1.0, "logits": self.logits_limit}
        if self.numbers == "float32" and not self.architecture:
            limits["kl"] = KL
            if not self.experts:
                limits["largest"] = max(LARGEST, OF_PEAK * self.peak)
        return limits

    def faults(self) -> list[str]:
        """The measures that are beyond their limits, or not a number."""
        infinite, limits = float("inf"), self.limits
        steps = f"{self.weights:,.0f}" if self.weights >= 10 else f"{self.weights:.2g}"
        said = {
            "weights": f"a number of {self.worst} is {steps} steps of rounding away",
            "logits": f"the logits at the median token: {self.logits:.2g}",
            "largest": f"the largest difference of logits: {self.largest:.2g}",
            "kl": f"the divergence, in nats a token: {self.kl:.2g}",
        }
        return [
            f"{sentence} (limit {limits.get(name, infinite):.2g})"
            for name, sentence in said.items()
            # Also if not a number.
            if not getattr(self, name) <= limits.get(name, infinite)
            or getattr(self, name) == infinite
        ]

    def warning(self) -> str:
        """A sentence on what the numbers in the files lose; "" where that is little."""
        if self.update is not None and self.update > 1 - MUCH:
            return (
                f"rounding to {self.numbers} moves what the adapters add to a matrix "
                f"by {self.update:.0%}; export in float32"
            )
        if self.kept is None or self.kept > MUCH:
            return ""
        return (
            f"rounding to {self.numbers} leaves {max(0.0, self.kept):.0%} of what the "
            f"adapters add (least in {self.least_kept}); export in float32, or the "
            "adapters alone with --format=peft"
        )

    def sentence(self) -> str:
        """The result in one line."""
        return (
            f"{self.tokens} tokens of {self.rows}: largest difference of logits "
            f"{self.largest:.1e}, KL {self.kl:.1e} nats a token, the likeliest token "
            f"agrees at {self.agreement:.1%}"
        )

    def facts(self) -> dict[str, Any]:
        """The content of `parity.json`."""
        return dataclasses.asdict(self) | {
            "architecture": self.architecture or "equal",
            "limits": self.limits,
        }
