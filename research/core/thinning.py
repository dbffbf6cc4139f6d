"""Long curves with as many points as a screen shows, and none of their peaks lost."""

import numpy as np

MOST_POINTS = 1500


def thin(
    x: np.ndarray, y: np.ndarray, points: int = MOST_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest value of each of `points / 2` equal parts of a curve.

    A loss that jumps for one step in 100,000 stays visible, which it would not where a
    part is shown by its mean or by its first value. Values that are not finite are kept
    where a part has nothing else, as gaps.

    Args:
      x: `[n]`, ascending.
      y: `[n]`.
      points: of the result, at most.
    """
    if len(x) <= points:
        return x, y
    parts = max(1, points // 2)
    edges = np.linspace(0, len(x), parts + 1).astype(np.int64)[:-1]
    finite = np.isfinite(y)
    chosen = [
        _first_of_each(np.where(finite, y, np.inf), edges, np.minimum),
        _first_of_each(np.where(finite, y, -np.inf), edges, np.maximum),
        np.array([0, len(x) - 1]),
    ]
    index = np.unique(np.concatenate(chosen))
    return x[index], y[index]


def _first_of_each(y: np.ndarray, edges: np.ndarray, extreme: np.ufunc) -> np.ndarray:
    """The first index in each part whose value is the part's lowest or highest."""
    best = extreme.reduceat(y, edges)
    sizes = np.diff(np.append(edges, len(y)))
    hits = np.flatnonzero(y == np.repeat(best, sizes))
    part = np.searchsorted(edges, hits, side="right") - 1
    _, first = np.unique(part, return_index=True)
    return hits[first]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` neighbours, centred, so that nothing is delayed.

    Values that are not finite count nowhere; near the ends a window is shorter.
    """
    if window < 2 or not len(y):
        return y
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    half = window // 2
    place = np.arange(len(y))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(y))
    counted = counts[high] - counts[low]
    return np.where(
        counted > 0, (sums[high] - sums[low]) / np.maximum(counted, 1), np.nan
    )
