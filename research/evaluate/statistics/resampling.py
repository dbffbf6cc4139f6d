"""Bootstrap and permutation of clusters of rows, through sums, without loops over rows.

Both take sums [clusters, k] of two models (or one) and a function of their total.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from research.evaluate.statistics.measured import Floats

RESAMPLES = 10_000
LEVEL = 0.95
# Above 10,000 clusters the resamples are fewer: so many clusters are drawn in all.
MOST_DRAWN, FEWEST = 100_000_000, 1000
# Numbers held at once for one block of resamples: 32 MB.
BLOCK = 4_000_000
# Up to this many clusters every exchange of the two models is tried (2 ** 13 = 8192).
ENUMERATED = 13
# Differences this near to each other are equal: they differ by rounding only.
ROUNDING = 1e-9


def resamples_of(clusters: int) -> int:
    """How many resamples of so many clusters are drawn."""
    return min(RESAMPLES, max(FEWEST, MOST_DRAWN // clusters))


def exchanges_of(clusters: int) -> float:
    """How many exchanges of two models are tried, if no more are wanted."""
    return math.inf if clusters <= ENUMERATED else resamples_of(clusters)


def _blocks(clusters: int, width: int, total: int) -> Iterator[int]:
    """Sizes of blocks of resamples, each with `clusters` weights and `width` sums."""
    size = max(1, BLOCK // max(clusters, width))
    for start in range(0, total, size):
        yield min(size, total - start)


def bootstrap(
    sums: Floats, value_of: Callable[[Floats], Floats], seed: int
) -> tuple[float, float] | None:
    """The 95 % interval of `value_of(sums.sum(0))`, for sums [clusters, k].

    Clusters are drawn with replacement (Field and Welsh 2007). The interval is the
    bias-corrected and accelerated one (BCa; Efron 1987, doi 10.1080/01621459.1987.
    10478410); its tails use Student's t and the factor sqrt(n / (n - 1)), because a
    bootstrap of few clusters is too narrow (Hesterberg 2015, section 5.3, doi
    10.1080/00031305.2015.1089789). None for fewer than two clusters.
    """
    from scipy import special  # Late: no training waits for it before its first step.

    count = len(sums)
    if count < 2:
        return None
    generator = np.random.default_rng([seed, 0])
    drawn = []
    for size in _blocks(count, sums.shape[1], resamples_of(count)):
        picks = generator.integers(0, count, (size, count))
        picks += np.arange(size)[:, None] * count
        weights = np.bincount(picks.ravel(), minlength=size * count)
        drawn.append(value_of(weights.reshape(size, count).astype(np.float64) @ sums))
    # A resample in which the metric is not defined (0 / 0) says nothing.
    values = np.concatenate(drawn)
    values = np.sort(values[np.isfinite(values)])
    found = float(value_of(sums.sum(0)))
    if not len(values) or not np.isfinite(found):
        return None
    near = ROUNDING * max(np.abs(values).max(), abs(found))
    below = np.searchsorted(values, found - near)
    equal = np.searchsorted(values, found + near, side="right") - below
    edge = 0.5 / len(values)
    bias = special.ndtri(np.clip((below + equal / 2) / len(values), edge, 1 - edge))
    spread, _ = jackknife(sums, value_of)
    scale = np.sum(spread**2) ** 1.5
    acceleration = np.sum(spread**3) / (6 * scale) if scale > 0 else 0.0
    tail = special.stdtrit(count - 1, (1 + LEVEL) / 2) * np.sqrt(count / (count - 1))
    reach = bias + np.array([-tail, tail])
    # Where the acceleration is so strong that BCa breaks down, it is not applied.
    slope = 1 - acceleration * reach
    corrected = bias + (reach / slope if np.all(slope > 0) else reach)
    low, high = np.quantile(values, special.ndtr(corrected))
    return float(low), float(high)


def jackknife(
    sums: Floats, value_of: Callable[[Floats], Floats]
) -> tuple[Floats, float]:
    """How far the value without each one cluster is below the mean of these values.

    Returns the distances [clusters] in units of the largest, so that squares and cubes
    stay in range, and that unit. Undefined values are dropped.
    """
    values = np.asarray(value_of(sums.sum(0) - sums))
    values = values[np.isfinite(values)]
    spread = values.mean() - values if len(values) else values
    unit = float(np.max(np.abs(spread), initial=0.0))
    return (spread / unit if unit > 0 else spread), unit


def standard_error(sums: Floats, value_of: Callable[[Floats], Floats]) -> float:
    """By the jackknife (Efron and Stein 1981); for the mean of n rows, sd / sqrt(n)."""
    spread, unit = jackknife(sums, value_of)
    count = len(spread)
    if count < 2:
        return float("nan")
    return unit * float(np.sqrt((count - 1) / count * np.sum(spread**2)))


def smallest_p(differing: int) -> float:
    """No exchange of two models can give less where they differ in so many clusters."""
    return min(1.0, 2.0 ** (1 - differing))


def permutation_p(
    first: Floats,
    second: Floats,
    value_of: Callable[[Floats], Floats],
    seed: int,
    exchanges: int = 0,
) -> float:
    """How often chance alone makes a difference as large as that of two models.

    If the models are equally good, their names can be exchanged in any cluster of rows
    (approximate randomization: Noreen 1989; for a mean this flips signs). Up to 13
    clusters all exchanges are tried and the p-value is exact; beyond, `exchanges`
    random ones (0: 10,000, fewer above 10,000 clusters), with the observed one among
    them, so that p is never 0 (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).
    Two-sided.
    """
    count = len(first)
    one, two, step = first.sum(0), second.sum(0), second - first

    def gaps(exchanged: Floats) -> Floats:
        moved = exchanged @ step
        return value_of(two - moved) - value_of(one + moved)

    observed = abs(float(value_of(two) - value_of(one)))
    scale = max(abs(float(value_of(two))), abs(float(value_of(one))), observed)
    least = observed - ROUNDING * scale

    def as_large(exchanged: Floats) -> int:
        # An exchange that leaves the metric undefined counts against a difference.
        return int(np.sum(~(np.abs(gaps(exchanged)) < least)))

    if count <= ENUMERATED:
        bits = np.arange(2**count)[:, None] >> np.arange(count)[None] & 1
        return as_large(bits.astype(np.float64)) / 2**count
    generator = np.random.default_rng([seed, 1])
    found, width = 1, 4 * -(-count // 32)  # bytes of bits, in whole draws
    total = exchanges or resamples_of(count)
    for size in _blocks(count, first.shape[1], total):
        drawn = np.frombuffer(generator.bytes(size * width), np.uint8)
        bits = np.unpackbits(drawn.reshape(size, width), axis=1, count=count)
        found += as_large(bits.astype(np.float64))
    return found / (total + 1)
