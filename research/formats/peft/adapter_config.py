"""The numbers of a PEFT adapter, as its `adapter_config.json` has them."""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.json_files import read_json

CONFIG, TENSORS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PREFIX = "base_model.model."  # The names of all tensors begin so.
# Fields that change what an adapter computes, or what it is added to, in a way that is
# not computed here.
CHANGES_FORWARD = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "layer_replication", "arrow_config", "kasa_config", "monteclora_config",
    "trainable_token_indices",
)  # fmt: skip
# These begin at the base model as it is; others (PiSSA, OLoRA, LoftQ) change it.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields without an effect on what a trained adapter computes.
HARMLESS = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "peft_version", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
    "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "fan_in_fan_out", "init_lora_weights", "ensure_weight_tying", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "qalora_group_size", "runtime_config",
)  # fmt: skip
NUMBER = int | float


@dataclasses.dataclass(frozen=True)
class LoraNumbers:
    """Ranks and scales of the modules of an adapter.

    Attributes:
      rank, alpha: of all modules without a pattern.
      rank_pattern, alpha_pattern: by the end of a module's name, as a regular
        expression; the first that matches counts.
      rslora: whether the scale is alpha / sqrt(rank), and not alpha / rank.
      tied: whether an adapter of the embeddings is that of a tied head, too.
      base_name: the model that it says it was trained on.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    tied: bool
    base_name: str

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _first_match(pattern: Mapping[str, float], module: str, default: float) -> float:
    for key, number in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return number
    return default


def read_numbers(folder: Path) -> LoraNumbers:
    """Reads the config of the adapter in `folder`.

    Raises:
      UserError: it is absent or damaged, or names something that changes what the
        adapter computes and is not computed here.
    """
    file = folder / CONFIG
    config = read_json(
        file,
        {
            "peft_type": str,
            "r": int,
            "lora_alpha": NUMBER,
            ...: object,
        },
        "give the folder that PEFT's save_pretrained wrote",
    )
    _refuse(file, config)
    patterns = [
        _pattern(file, name, config.get(name))
        for name in ("rank_pattern", "alpha_pattern")
    ]
    numbers = LoraNumbers(
        config["r"],
        config["lora_alpha"],
        *patterns,
        bool(config.get("use_rslora")),
        bool(config.get("ensure_weight_tying")),
        str(config.get("base_model_name_or_path") or "a base without a name"),
    )
    for name, number in [
        ("r", numbers.rank), ("lora_alpha", numbers.alpha),
        *(item for each in patterns for item in each.items()),
    ]:  # fmt: skip
        if not 0 < number < math.inf:
            raise UserError(f"{file}: {name} is {number}; it must be above 0")
    return numbers


def _refuse(file: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(
            f"{file}: peft_type is {config['peft_type']!r}, and only LORA is computed "
            "here: merge it with PEFT's merge_and_unload, and give the merged folder "
            "to config.model.init_from"
        )
    for name in CHANGES_FORWARD:
        if config.get(name):
            raise UserError(
                f"{file}: {name} is {config[name]!r}, which is not computed here: "
                "merge the adapter with PEFT's merge_and_unload, and give the merged "
                "folder to config.model.init_from"
            )
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, so the adapter may lie over a "
            "changed base: save it again with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it one to the "
            "unchanged base"
        )
    unknown = [x for x in config if x not in (*HARMLESS, *CHANGES_FORWARD)]
    if odd := [name for name in unknown if config[name]]:
        logging.warning("%s: %s is not known, and has no effect", file, ", ".join(odd))


def _pattern(file: Path, name: str, found: Any) -> dict[str, float]:
    found = found or {}
    is_pattern = isinstance(found, dict) and all(
        isinstance(x, NUMBER) and not isinstance(x, bool) for x in found.values()
    )
    if not is_pattern:
        raise UserError(
            f"{file}: {name} is {repr(found)[:80]}, not a number for each pattern"
        )
    for key in found:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(
                f"{file}: {name} has {key!r}, which is no regular expression: {error}"
            ) from error
    return found


def written_config(
    ranks: Mapping[str, int],
    scale: float,
    *,
    of_experts: int = 0,
    fan_in_fan_out: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """The smallest config with which PEFT reads modules of these `ranks`.

    All modules have one `scale`, so that tools which know no patterns (vLLM) compute
    the same. `r` is the largest rank, as such tools make room for it; or it is the
    rank `of_experts`, for which PEFT knows no pattern.

    A pattern lacks the first part of a module's name, behind which PEFT looks for
    patterns in all of its versions.
    """
    largest = of_experts or max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        # Without it, PEFT imports the library that `auto_mapping` names.
        "task_type": "CAUSAL_LM",
        "r": largest,
        "lora_alpha": _whole(scale * largest),
        "target_modules": sorted(ranks),
    }
    others = {
        re.escape(name.partition(".")[2] or name): rank
        for name, rank in ranks.items()
        if rank != largest
    }
    root = scale * math.sqrt(largest)
    if others:
        config["rank_pattern"] = others
        config["alpha_pattern"] = {x: _whole(scale * r) for x, r in others.items()}
    elif not isinstance(config["lora_alpha"], int) and isinstance(_whole(root), int):
        config |= {"lora_alpha": _whole(root), "use_rslora": True}
    if fan_in_fan_out:
        config["fan_in_fan_out"] = True
    if tied:
        config["ensure_weight_tying"] = True
    return config


def _whole(number: float) -> int | float:
    """A whole number as one, as some readers know no other alpha."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-12) else number
