"""Parameters by path: a flat dictionary, dotted names, selection that must match."""

import collections
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.config.choices import listed_patterns
from research.core.errors import UserError, nearest
from research.weights.parameter_spec import Spec
from research.weights.quantized.quantized_matrix import QuantizedMatrix
from research.weights.representations.leaf import Leaf

# As in PEFT: all matrices but the embedding, the head, and the router of experts, which
# is no linear layer in transformers 5.
ALL_LINEAR, ROUTED = "all-linear", "choices"


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
    """Undoes `flatten`; the dictionary must have the order that `flatten` gave it."""
    return jax.tree_util.tree_unflatten(structure, list(flat.values()))


def select(paths: Iterable[str], patterns: Sequence[str]) -> dict[str, str]:
    """The `paths` that `re.search` matches: `{path: last pattern that matches it}`.

    Raises:
      UserError: a pattern matches nothing; the message lists the paths.
    """
    paths = list(paths)
    chosen: dict[str, str] = {}
    for pattern in patterns:
        expression = _compile(pattern)
        matched = [path for path in paths if expression.search(path)]
        if not matched:
            raise _no_match(pattern, _words(paths), paths)
        chosen.update(dict.fromkeys(matched, pattern))
    return {path: chosen[path] for path in paths if path in chosen}


def own_patterns(
    patterns: Sequence[str],
    specs: Mapping[str, Spec],
    groups: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """`patterns` for `select`, where names of other tools may stand among them.

    A pattern that matches no path of ours may match the end of a module's name, from a
    dot on, as `q_proj`, `self_attn.q_proj` and `(q|v)_proj` do. `all-linear` stands for
    every matrix of the layers but routers. One pattern may hold several names between
    commas. `groups` has the patterns that further names stand for.

    Raises:
      UserError: a pattern matches neither a path nor a name; the message lists both.
    """
    found = []
    for written in patterns:
        for pattern in listed_patterns(written):
            own = groups.get(pattern, pattern)
            expression = _compile(own)
            if any(expression.search(path) for path in specs):
                found.append(own)
                continue
            paths = [
                path
                for path, spec in specs.items()
                if (pattern == ALL_LINEAR and _is_linear(spec))
                or any(map(expression.fullmatch, _ends(spec)))
            ]
            if not paths:
                words = {end for spec in specs.values() for end in _ends(spec)}
                listed = [f"{path}{_shown(spec)}" for path, spec in specs.items()]
                every = "every matrix of the layers but routers"
                listed.append(f"and {ALL_LINEAR} stands for {every}")
                if groups:
                    listed.append(f"and {', '.join(groups)} for all of their kind")
                raise _no_match(pattern, {*_words(specs), *words, *groups}, listed)
            found.append(f"^({'|'.join(map(re.escape, paths))})$")
    return tuple(found)


def _is_linear(spec: Spec) -> bool:
    return spec.stacked > 0 and spec.n_in > 0 and ROUTED not in spec.axes


def _ends(spec: Spec) -> list[str]:
    """`["layers.{}.mlp.up_proj", ..., "mlp.up_proj", "up_proj"]`."""
    parts = [name.split(".") for name in spec.names]
    return [".".join(part[i:]) for part in parts for i in range(len(part))]


def _shown(spec: Spec) -> str:
    names = ", ".join(name.rpartition("{}.")[2] for name in spec.names)
    return names and f" ({names})"


def _no_match(pattern: str, words: Iterable[str], listed: Iterable[str]) -> UserError:
    return UserError(
        f"pattern {pattern!r} matches no parameter{nearest(pattern, words)}; the paths "
        "are:\n  " + "\n  ".join(listed)
    )


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether any pattern is found in `path`.

    Raises:
      UserError: a pattern is not a regular expression.
    """
    return any(_compile(pattern).search(path) for pattern in patterns)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"pattern {pattern!r} is not a regular expression: {error}"
        ) from error


def _words(paths: Iterable[str]) -> list[str]:
    return sorted({word for path in paths for word in path.split(".")})


def numbers_by_pattern(
    paths: Mapping[str, Any], overrides: Sequence[str], default: float
) -> dict[str, float]:
    """One number a path: that of the last `pattern=number` that matches, or default.

    Raises:
      UserError: an override has another form, or its pattern matches no path.
    """
    numbers = {}
    for override in overrides:
        pattern, equals, number = override.rpartition("=")
        numbers.pop(pattern, None)  # A repeated pattern counts as the last one.
        try:
            numbers[pattern] = float(number)
        except ValueError:
            equals = ""
        if not equals or not 0 < numbers[pattern] < math.inf:
            raise UserError(
                f"{override!r} is not 'pattern=number' with a number above 0, "
                "such as 'mlp=4'"
            )
    chosen = select(paths, tuple(numbers))
    return {path: numbers.get(chosen.get(path), default) for path in paths}


def pad_with_zeros(own: Any, wide: Any) -> Any:
    """`own` in the shapes of `wide`: values first on every axis, then zeros.

    Paths of `wide` that `own` lacks are zero. `wide` holds shapes or `Spec`s; the
    dtypes are those of `own`, else of `wide`, else float32.
    """
    known, _ = flatten(own)
    leaves, structure = flatten(wide)

    def one(path: str, leaf: Any) -> jax.Array:
        old = known.get(path)
        dtype = getattr(leaf if old is None else old, "dtype", None) or np.float32
        value = np.zeros(leaf.shape, dtype)
        if old is not None:
            value[tuple(map(slice, old.shape))] = old
        return jnp.asarray(value)

    return unflatten(structure, {path: one(path, x) for path, x in leaves.items()})


def not_finite(tree: Any) -> list[str]:
    """The dotted paths of the arrays that hold a number that is not finite.

    Each array is read once, where it lies; it may be spread over several processes,
    all of which must call this.
    """
    flags = flatten(_hold_odd_numbers(tree))[0]
    return [path for path, flag in flags.items() if flag]


@jax.jit
def _hold_odd_numbers(tree: Any) -> Any:
    on_device = jax.device_put(tree, jax.memory.Space.Device)
    return jax.tree.map(lambda x: ~jnp.all(jnp.isfinite(x)), on_device)


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays, shapes or `Leaf`s.

    A `Leaf` counts as the array that it stands for, however it is stored.
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Leaf))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def nbytes(tree: Any) -> int:
    """Stored bytes of a tree of arrays or `jax.ShapeDtypeStruct`s, on all devices."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def bytes_by_form(tree: Any, size: Callable[[Any], int] = nbytes) -> dict[str, int]:
    """`size` of a tree by how its weights are stored: a dtype, or a name of codes."""
    found: dict[str, int] = collections.defaultdict(int)

    def is_coded(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedMatrix)

    for leaf in jax.tree.leaves(tree, is_leaf=is_coded):
        form = leaf.form if is_coded(leaf) else str(leaf.dtype)
        found[form] += size(leaf)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
