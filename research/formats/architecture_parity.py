"""Whether two architectures compute the same, field by field."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.models.architecture import Architecture, Experts, Rope
from research.models.parts.rotary import rope_frequencies

# Compared layer by layer, as `ropes` and `windows`; or of no effect on what a model
# computes.
BY_LAYER = {
    "rope_theta", "rope_scaling", "rope_fraction", "window_rope", "unrotated_layers",
    "window", "window_layers",
}  # fmt: skip
WITHOUT_EFFECT = {"family"}
GELUS = {"gelu", "gelu_tanh"}
Pair = tuple[Any, Any]


def differences(ours: Architecture, theirs: Architecture) -> Mapping[str, Pair]:
    """The fields, by name, in which two models do not compute the same.

    Numbers are compared as far as float32 can tell, and rotary embeddings by what
    they turn: several settings can mean one computation.
    """
    names = ["windows", "ropes"]
    names += [
        field.name
        for field in dataclasses.fields(ours)
        if field.name not in BY_LAYER | WITHOUT_EFFECT
    ]
    ours, theirs = _with_scale(ours), _with_scale(theirs)
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    return {
        name: _shown(pair, ours.head_dim) if name == "ropes" else pair
        for name, pair in pairs.items()
        if not _same(*pair, ours.head_dim)
    }


def excused(ours: Architecture, theirs: Architecture) -> Mapping[str, str]:
    """Sentences by field on differences that change nothing where a file is used.

    llama.cpp approximates GELU whatever a file says, and computes no windows for some
    families: their files end the context where the window does.
    """
    found, sentences = differences(ours, theirs), {}
    if set(found.get("activation", ())) == GELUS:
        sentences["activation"] = (
            f"the file says {theirs.activation} for {ours.activation}: llama.cpp "
            "approximates both"
        )
    longest = min(filter(None, ours.windows), default=0)
    if not any(theirs.windows) and theirs.max_position <= longest:
        said = f"no windows: the context ends at {theirs.max_position} tokens"
        # Layers with a window may have a rotary embedding of their own.
        names = ("windows", "max_position")
        sentences |= {name: said for name in names if name in found}
    return sentences


def _with_scale(a: Architecture) -> Architecture:
    usual = a.head_dim**-0.5
    return dataclasses.replace(a, attention_scale=a.attention_scale or usual)


def _shown(pair: Pair, head_dim: int) -> Pair:
    """The embeddings of the first layer that differs."""
    for ours, theirs in zip(*pair, strict=False):
        if not _same(ours, theirs, head_dim):
            return ours, theirs
    return tuple(map(len, pair))


def _same(ours: Any, theirs: Any, head_dim: int) -> bool:
    if ours == theirs:
        return True
    if isinstance(ours, Experts) and isinstance(theirs, Experts):
        # A loss is no part of what is computed in a file.
        return ours == dataclasses.replace(theirs, balance_weight=ours.balance_weight)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if isinstance(ours, Rope) and isinstance(theirs, Rope):
        pairs = zip(turns(ours, head_dim), turns(theirs, head_dim), strict=True)
        return all(
            x.shape == y.shape and np.allclose(x, y, rtol=1e-5, atol=0)
            for x, y in pairs
        )
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(
            _same(x, y, head_dim) for x, y in zip(ours, theirs, strict=True)
        )
    return False


@functools.lru_cache(64)
def turns(rope: Rope, head_dim: int) -> tuple[np.ndarray, ...]:
    """All that a rotary embedding computes with: two ropes with the same are one."""
    short, long = (
        np.asarray(rope_frequencies(rope, head_dim, long_row=long_row))
        for long_row in (False, True)
    )
    scaling = rope.scaling
    ends = scaling.original_max_position if scaling.kind == "longrope" else 0
    same = np.array_equal(short, long)
    return short, long, np.array([scaling.attention_factor, 0 if same else ends])
