"""Writes the adapters of a run as a folder of PEFT."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.formats.peft.adapter_config import PREFIX, written_config
from research.formats.peft.lora_modules import (
    LINEAR_ENDS,
    LoraModule,
    Pair,
    lora_modules,
    tied_head,
    without_idle,
)
from research.models.architecture import Architecture
from research.weights.adapters.lora import KIND
from research.weights.parameter_spec import Spec

Fetch = Callable[[str, tuple[int, ...]], Pair]


def adapter_files(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    scales: Mapping[str, float],
    fetch: Fetch,
    beginning: str = "",
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The float32 tensors of an adapter folder, and its config without a base.

    An adapter of tied embeddings is written for both ends: older versions of PEFT do
    not know that one is the other.

    See `lora_tensors` for the arguments and errors.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    tied = fan_in_fan_out = False
    of_experts = 0

    def add(name: str, ends: tuple[str, str], down: np.ndarray, up: np.ndarray) -> None:
        ranks[name] = len(down)
        for end, value in zip(ends, (down, up), strict=True):
            tensors[f"{PREFIX}{name}.{end}"] = np.ascontiguousarray(value)

    found = lora_tensors(architecture, specs, scales, fetch, beginning)
    for module, (down, up) in found:
        add(module.name, module.ends, down, up)
        of_experts = len(down) if module.has_no_pattern else of_experts
        fan_in_fan_out |= not (module.is_table or module.stored.transposed)
        if architecture.tied_head and "embedding.table" in module.stored.paths:
            add(tied_head(architecture), LINEAR_ENDS, up.T, down.T)
            tied = True
    if not ranks:
        raise UserError("the adapters are all zero, and PEFT has no rank for them")
    config = written_config(
        ranks,
        common_scale(scales),
        of_experts=of_experts,
        fan_in_fan_out=fan_in_fan_out,
        tied=tied,
    )
    return tensors, config


def common_scale(scales: Mapping[str, float]) -> float:
    """The scale of most paths."""
    return collections.Counter(scales.values()).most_common(1)[0][0]


def lora_tensors(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    scales: Mapping[str, float],
    fetch: Fetch,
    beginning: str = "",
) -> Iterator[tuple[LoraModule, Pair]]:
    """`lora_A` and `lora_B` of each module with adapters, all at `common_scale`.

    Args:
      architecture, specs: of the model.
      scales: alpha / rank by path.
      fetch: `(path, index) -> (a, b)`, the factors of one layer.
      beginning: that of `lora_modules`.

    Raises:
      UserError: a path has adapters, and is no module that PEFT adapts.
    """
    modules = lora_modules(architecture, specs, beginning)
    known = {path for module in modules for path in module.stored.paths}
    if odd := sorted(scales.keys() - known):
        raise UserError(f"PEFT has no modules for the adapters of {', '.join(odd)}")
    common = common_scale(scales)
    with_experts = any(
        x.is_of_expert and not scales.keys().isdisjoint(x.stored.paths) for x in modules
    )
    wide = _rank_without_pattern(modules, scales, fetch)
    for module in modules:
        pairs = {}
        for path in module.stored.paths:
            pair = None
            if path in scales:
                pair = _scaled(fetch(path, module.index), scales[path] / common)
            if module.has_no_pattern:
                if pair or (with_experts and module.is_of_expert):
                    pairs[path] = _filled(pair, wide, specs[path])
            elif pair and len((pair := without_idle(pair))[1]):
                pairs[path] = pair
        if pairs:
            yield module, module.join(pairs, specs)


def _rank_without_pattern(
    modules: list[LoraModule], scales: Mapping[str, float], fetch: Fetch
) -> int:
    """The rank that holds the adapters of all experts and routers; 0 without any.

    PEFT stacks those of a layer, so all matrices of experts have adapters of one rank.
    """
    first = {x.stored: x for x in modules if x.has_no_pattern}.values()
    ranks = [
        len(fetch(path, module.index)[1])
        for module in first
        for path in module.stored.paths
        if path in scales
    ]
    return max(ranks, default=0)


def _scaled(pair: Pair, factor: float) -> Pair:
    a, b = pair
    return pair if factor == 1 else (a, b * np.float32(factor))


def _filled(pair: Pair | None, rank: int, spec: Spec) -> Pair:
    """`pair` with zeros up to `rank`."""
    shapes = KIND.matrix_specs(spec, rank)
    a, b = (np.zeros(shapes[x].shape[spec.stacked :], np.float32) for x in "ab")
    if pair is not None:
        a[..., : len(pair[1])], b[: len(pair[1])] = pair
    return a, b
