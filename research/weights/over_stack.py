"""A function of one matrix, applied to stacked ones."""

from collections.abc import Callable
from typing import Any

import jax


def over_stack(function: Callable[[Any], Any], axes: int) -> Callable[[Any], Any]:
    """`function` of a tree, for a tree of arrays with `axes` stacking axes first.

    One after the other, so that what it makes of one matrix is not there for all.
    """
    for _ in range(axes):
        function = _mapped(function)
    return function


def _mapped(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda tree: jax.lax.map(function, tree)
