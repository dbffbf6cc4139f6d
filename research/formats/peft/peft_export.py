"""Writes the adapters of a run as a folder of PEFT."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.formats.fused_factors import Pair, filled, join_lengths, without_idle
from research.formats.peft.adapter_config import PREFIX, written_config
from research.formats.peft.lora_modules import (
    INNER,
    LENGTHS_END,
    LINEAR_ENDS,
    LoraModule,
    lora_modules,
    tied_head,
)
from research.models.architecture import Architecture
from research.weights.parameter_spec import Spec

Fetch = Callable[[str, tuple[int, ...]], Pair]
FetchLengths = Callable[[str, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """The content of an adapter folder, before it is written.

    Attributes:
      config: `adapter_config.json` without a base.
      shapes: of the tensors by name, in their order.
      tensors: makes the tensors one after the other, float32. Every process calls it.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]


def plan_adapter(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    scales: Mapping[str, float],
    fetch: Fetch,
    beginning: str = "",
    fetch_lengths: FetchLengths | None = None,
) -> AdapterPlan:
    """The folder of an adapter; the factors of one module at a time are in memory.

    They are fetched twice: how many components of a padded rank remain shows only in
    their values. `fetch_lengths` gives the lengths of DoRA for one layer of a path,
    `[*out]`. See `lora_tensors` for the other arguments, and errors.
    """
    head, shapes = tied_head(architecture), {}
    ranks: dict[str, int] = {}
    parameters: set[str] = set()
    tied = fan_in_fan_out = False
    of_experts, dora = 0, bool(fetch_lengths)

    def modules() -> Iterator[tuple[LoraModule, Pair, np.ndarray | None]]:
        found = lora_tensors(architecture, specs, scales, fetch, beginning, dora)
        return _with_lengths(found, fetch_lengths, specs)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for module, pair, lengths in modules():
            yield from _named(module.name, module.ends, pair)
            if dora:
                yield f"{PREFIX}{module.name}{LENGTHS_END}", lengths
            if architecture.tied_head and "embedding.table" in module.stored.paths:
                # Older versions of PEFT do not know that one end is the other.
                down, up = pair
                yield from _named(head, LINEAR_ENDS, (up.T, down.T))

    for module, (down, up), _ in modules():
        rank = ranks[module.target] = len(down) // module.experts(specs)
        shapes |= _shapes(module.name, module.ends, down.shape, up.shape)
        shapes |= {f"{PREFIX}{module.name}{LENGTHS_END}": up.shape[:1]} if dora else {}
        of_experts = rank if module.has_no_pattern else of_experts
        if module.parameter:
            parameters.add(module.parameter)
        else:
            fan_in_fan_out |= not (module.is_table or module.stored.transposed)
        if architecture.tied_head and "embedding.table" in module.stored.paths:
            ranks[head], tied = rank, True
            shapes |= _shapes(head, LINEAR_ENDS, up.shape[::-1], down.shape[::-1])
    if not ranks:
        raise UserError("the adapters are all zero, and PEFT has no rank for them")
    config = written_config(
        ranks,
        common_scale(scales),
        parameters=parameters,
        of_experts=of_experts,
        fan_in_fan_out=fan_in_fan_out,
        tied=tied,
        dora=dora,
    )
    return AdapterPlan(config, shapes, tensors)


def _with_lengths(
    modules: Iterable[tuple[LoraModule, Pair]],
    fetch: FetchLengths | None,
    specs: Mapping[str, Spec],
) -> Iterator[tuple[LoraModule, Pair, np.ndarray | None]]:
    """Each module with its lengths, None for LoRA; without those that have zeros alone.

    Zeros stand for a layer without an adapter.
    """
    for module, pair in modules:
        if fetch is None:
            yield module, pair, None
            continue
        own = {path: fetch(path, module.index) for path in module.stored.paths}
        lengths = join_lengths(module.stored, own, specs)
        if lengths.any():
            yield module, pair, lengths


def _named(
    name: str, ends: tuple[str, str], pair: Pair
) -> Iterator[tuple[str, np.ndarray]]:
    for end, value in zip(ends, pair, strict=True):
        yield f"{PREFIX}{name}.{end}", value


def _shapes(
    name: str, ends: tuple[str, str], *shapes: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    names = [f"{PREFIX}{name}.{end}" for end in ends]
    return dict(zip(names, shapes, strict=True))


def common_scale(scales: Mapping[str, float]) -> float:
    """The scale of most paths."""
    return collections.Counter(scales.values()).most_common(1)[0][0]


def adapted_modules(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    paths: Collection[str],
    beginning: str = "",
) -> list[LoraModule]:
    """The modules in which a matrix of `paths` lies; see `lora_tensors`.

    Raises:
      UserError: one of them lies in no module that PEFT adapts.
    """
    modules = lora_modules(architecture, specs, beginning)
    known = {path for module in modules for path in module.stored.paths}
    if odd := sorted({*paths} - known):
        raise UserError(
            f"PEFT has no modules for the adapters of {', '.join(odd)}: use --format=hf"
        )
    return [x for x in modules if {*paths} & {*x.stored.paths}]


def lora_tensors(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    scales: Mapping[str, float],
    fetch: Fetch,
    beginning: str = "",
    keep_idle: bool = False,
) -> Iterator[tuple[LoraModule, Pair]]:
    """`lora_A` and `lora_B` of each module with adapters, all at `common_scale`.

    Args:
      architecture, specs: of the model.
      scales: alpha / rank by path.
      fetch: `(path, index) -> (a, b)`, the factors of one layer.
      beginning: that of `lora_modules`.
      keep_idle: a module stays where all its factors are zero.

    Raises:
      UserError: a path has adapters, and is no module that PEFT adapts.
    """
    modules = lora_modules(architecture, specs, beginning)
    adapted = adapted_modules(architecture, specs, scales, beginning)
    common = common_scale(scales)
    with_experts = any(x.is_of_expert for x in adapted)
    places = {x.name for x in adapted}
    wide = _rank_without_pattern(modules, scales, fetch)
    for module in modules:
        pairs = {}
        for path in module.stored.paths:
            pair = None
            if path in scales:
                pair = _scaled(fetch(path, module.index), scales[path] / common)
            if module.has_no_pattern:
                if pair or (with_experts and module.is_of_expert):
                    pairs[path] = filled(pair, wide, specs[path], len(module.index))
            elif pair:
                is_whole = module.parameter or keep_idle
                pair = pair if is_whole else without_idle(pair)
                if is_whole or len(pair[1]):
                    pairs[path] = pair
        outer = module.name.removesuffix(INNER)
        if outer not in places:  # PEFT wraps the experts for this parameter alone.
            module = dataclasses.replace(module, name=outer)
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
