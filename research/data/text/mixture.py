"""How much of each source goes into training."""

import math
from collections.abc import Sequence

from research.config.run_config import TextConfig
from research.core.errors import UserError, nearest


def mixture_weights(config: TextConfig, names: Sequence[str]) -> dict[str, float]:
    """Shares by source name that sum to 1, or nothing where `mixture` is empty.

    Raises:
      UserError: a name or a weight that cannot be, or a source without a weight.
    """
    weights: dict[str, float] = {}
    for written in config.mixture:
        name, equals, number = written.partition("=")
        if not equals:
            raise UserError(f"config.text.mixture has {written!r}; write name=weight")
        if name not in names:
            raise UserError(
                f"config.text.mixture has {written!r}, and no source is named {name!r}"
                f"{nearest(name, names)}; config.text.sources has {', '.join(names)}"
            )
        if name in weights:
            raise UserError(f"config.text.mixture names {name!r} twice; keep one")
        weights[name] = _weight(written, number)
    if not weights:
        return {}
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(
            f"config.text.mixture has no weight for {', '.join(missing)}; give one, "
            f"or {missing[0]}=0 to only evaluate on it"
        )
    total = sum(weights.values())
    if total <= 0:
        raise UserError("config.text.mixture is all zeros; raise at least one weight")
    return {name: weights[name] / total for name in names}


def _weight(written: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(
            f"config.text.mixture has {written!r}; the weight must be a number of at "
            "least 0"
        )
    return weight
