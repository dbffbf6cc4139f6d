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
from research.weights.parameter_spec import Spec

Fetch = Callable[[str, tuple[int, ...]], Pair]


def adapter_files(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    scales: Mapping[str, float],
    fetch: Fetch,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The float32 tensors of an adapter folder, and its config without a base.

    An adapter of tied embeddings is written for both ends: older versions of PEFT do
    not know that one is the other.

    See `lora_tensors` for the arguments and errors.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    tied = fan_in_fan_out = False

    def add(name: str, ends: tuple[str, str], down: np.ndarray, up: np.ndarray) -> None:
        ranks[name] = len(down)
        for end, value in zip(ends, (down, up), strict=True):
            tensors[f"{PREFIX}{name}.{end}"] = np.ascontiguousarray(value)

    for module, (down, up) in lora_tensors(architecture, specs, scales, fetch):
        add(module.name, module.ends, down, up)
        fan_in_fan_out |= not (module.is_table or module.stored.transposed)
        if architecture.tied_head and "embedding.table" in module.stored.paths:
            add(tied_head(architecture), LINEAR_ENDS, up.T, down.T)
            tied = True
    if not ranks:
        raise UserError("the adapters are all zero, and PEFT has no rank for them")
    config = written_config(
        ranks, common_scale(scales), fan_in_fan_out=fan_in_fan_out, tied=tied
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
) -> Iterator[tuple[LoraModule, Pair]]:
    """`lora_A` and `lora_B` of each module with adapters, all at `common_scale`.

    Args:
      architecture, specs: of the model.
      scales: alpha / rank by path.
      fetch: `(path, index) -> (a, b)`, the factors of one layer.

    Raises:
      UserError: a path has adapters, and is no module that PEFT adapts.
    """
    modules = lora_modules(architecture, specs)
    known = {path for module in modules for path in module.stored.paths}
    if odd := sorted(scales.keys() - known):
        raise UserError(f"PEFT has no modules for the adapters of {', '.join(odd)}")
    common = common_scale(scales)
    for module in modules:
        pairs = {}
        for path in module.stored.paths:
            if path in scales:
                a, b = without_idle(fetch(path, module.index))
                if scales[path] != common:
                    b = b * np.float32(scales[path] / common)
                if len(b):
                    pairs[path] = a, b
        if pairs:
            yield module, module.join(pairs, specs)
