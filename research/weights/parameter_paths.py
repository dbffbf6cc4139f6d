"""Parameters by path: a flat dictionary, dotted names, selection that must match."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from research.core.errors import UserError, nearest


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """A nested pytree as `{dotted path: leaf}`, and the structure to undo it."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    flat = {
        ".".join(jax.tree_util.keystr((k,), simple=True) for k in path): leaf
        for path, leaf in leaves
    }
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same dotted path")
    return flat, structure


def unflatten(structure: Any, flat: dict[str, Any]) -> Any:
    """Undoes `flatten`; the dictionary must be in its order."""
    return jax.tree_util.tree_unflatten(structure, list(flat.values()))


def select(paths: Iterable[str], patterns: Sequence[str]) -> dict[str, str]:
    """Which of `paths` match, by `re.search`: `{path: last pattern that matches}`.

    Raises:
      UserError: a pattern matches nothing; the message lists the paths.
    """
    paths = list(paths)
    chosen: dict[str, str] = {}
    for pattern in patterns:
        expression = _compile(pattern)
        matched = [path for path in paths if expression.search(path)]
        if not matched:
            hint = nearest(pattern, _words(paths))
            raise UserError(
                f"pattern {pattern!r} matches no parameter{hint}; the paths are:\n  "
                + "\n  ".join(paths)
            )
        chosen.update(dict.fromkeys(matched, pattern))
    return {path: chosen[path] for path in paths if path in chosen}


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether any pattern is found in `path`.

    Raises:
      UserError: a pattern is no regular expression.
    """
    return any(_compile(pattern).search(path) for pattern in patterns)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"pattern {pattern!r} is no regular expression: {error}"
        ) from error


def _words(paths: Iterable[str]) -> list[str]:
    return sorted({word for path in paths for word in path.split(".")})


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or `jax.ShapeDtypeStruct`s, over all devices."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
