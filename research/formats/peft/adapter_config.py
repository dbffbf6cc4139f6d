"""The numbers of a PEFT adapter, as its `adapter_config.json` has them."""

import dataclasses
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import regex

from research.core.errors import UserError
from research.core.json_files import mismatch, read_json
from research.core.local_paths import ADAPTER_FILE

CONFIG, TENSORS, PICKLED = (
    ADAPTER_FILE,
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PREFIX = "base_model.model."  # The names of all tensors begin so.
# These begin at the base model as it is; others (PiSSA, OLoRA, LoftQ) change it.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Every field of PEFT 0.21's LoraConfig. Supported: its value, or the tensors that it
# led to, are read here. Without effect: only on the start of the factors, on how they
# are trained or on how they are computed. Refused, where set: it changes what the
# adapter computes, or what it is added to, in a way that is not computed here.
SUPPORTED, NO_EFFECT, REFUSED = "supported", "without effect", "refused"
FIELDS = {
    **dict.fromkeys((
        "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha",
        "peft_version",
        "use_rslora", "rank_pattern", "alpha_pattern", "ensure_weight_tying",
        "target_modules", "target_parameters", "exclude_modules",
        "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
        "fan_in_fan_out", "init_lora_weights", "use_dora",
    ), SUPPORTED),
    **dict.fromkeys((
        "task_type", "auto_mapping", "inference_mode", "lora_dropout",
        "megatron_config", "megatron_core", "runtime_config", "qalora_group_size",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config",
    ), NO_EFFECT),
    **dict.fromkeys((
        "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
        "layer_replication", "arrow_config", "kasa_config", "monteclora_config",
        "trainable_token_indices",
    ), REFUSED),
}  # fmt: skip
MERGED = (
    "merge the adapter with PEFT's merge_and_unload, and give the merged folder to "
    "config.model.init_from"
)
NUMBER = int | float


LARGEST = 2**31
BIASES = ("none", "all", "lora_only")
# CPU seconds that one folder's expressions may take where they are SLOW on a name;
# others take microseconds.
MATCHING, SLOW = 10.0, 0.01
REMEDY = "give the folder that PEFT's save_pretrained wrote"


@dataclasses.dataclass(frozen=True)
class LoraNumbers:
    """Ranks and scales of the modules of an adapter.

    Attributes:
      rank, alpha: of all modules without a pattern.
      rank_pattern, alpha_pattern: by the end of a module's name, as a regular
        expression; the first that matches counts.
      rslora: whether the scale is alpha / sqrt(rank), and not alpha / rank.
      tied: whether an adapter of the embeddings is that of a tied head, too.
      base_name, revision: the model that it says it was trained on, or "".
      version: of the PEFT that wrote it, or "".
      parameters: ends of the names of parameters that PEFT wraps.
      dora: whether each module has the lengths of DoRA.
      modules: ends of the names of modules that were trained whole.
      bias: which biases were trained: none, all, or lora_only (of adapted modules).
      targets: ends of the names of modules that all have factors, where a list of
        the config says so, for all layers.
      matching: looks modules up in the patterns.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    tied: bool
    base_name: str
    revision: str
    version: str
    parameters: tuple[str, ...]
    dora: bool
    modules: tuple[str, ...] = ()
    bias: str = "none"
    targets: tuple[str, ...] = ()
    matching: "_Matching" = dataclasses.field(
        default_factory=lambda: _Matching(MATCHING), compare=False, repr=False
    )

    def trains(self, name: str) -> bool:
        """Whether the parameter `name`, which the folder holds whole, was trained.

        PEFT trains every parameter in a module whose name ends in one of `modules`.
        """
        parts = name.split(".")[:-1]
        places = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        of_module = any(place.endswith(x) for place in places for x in self.modules)
        return of_module or (self.bias != "none" and name.endswith(".bias"))

    def target_of(self, module: str) -> str:
        """The name that patterns are matched with: the module's or its weight's."""
        weight = f"{module}.weight"
        is_parameter = any(f".{weight}".endswith(f".{x}") for x in self.parameters)
        return weight if is_parameter else module

    def rank_of(self, module: str) -> int:
        return int(self.matching.first(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = self.matching.first(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class _Matching:
    """Looks names up in patterns that a stranger wrote, within `seconds` of CPU."""

    def __init__(self, seconds: float):
        self._left = seconds
        self._compiled: dict[str, Any] = {}

    def first(self, pattern: Mapping[str, float], module: str, default: float) -> float:
        """The number of the first expression that matches the end of `module`.

        Raises:
          UserError: the expressions of this folder take longer than all of them may.
        """
        for key, number in pattern.items():
            if key not in self._compiled:
                self._compiled[key] = regex.compile(rf"(.*\.)?({key})$")
            began, limit = time.thread_time(), max(self._left, SLOW)
            try:
                # `concurrent` lets the other threads of a server run meanwhile.
                found = self._compiled[key].match(
                    module, timeout=limit, concurrent=True
                )
            except TimeoutError as error:
                raise UserError(
                    f"rank_pattern or alpha_pattern of {CONFIG} has {_short(key)}, a "
                    f"regular expression that takes too long on {module}: write the "
                    "name of a module, or an expression without repeats in repeats"
                ) from error
            if (spent := time.thread_time() - began) > SLOW:
                self._left -= spent
            if found:
                return number
        return default


def read_numbers(folder: Path) -> LoraNumbers:
    """Reads the config of the adapter in `folder`.

    Raises:
      UserError: it is absent or damaged, or names something that changes what the
        adapter computes and is not computed here.
    """
    file = folder / CONFIG
    shape = {"peft_type": str, "r": int, "lora_alpha": NUMBER, ...: object}
    config = read_json(file, shape, REMEDY)
    _refuse(file, config)

    def field(name: str, kind: Any, default: Any) -> Any:
        value = config.get(name)
        if problem := "" if value is None else mismatch(value, kind, name):
            raise UserError(f"{file}: {problem}; {REMEDY}")
        return default if value is None else value

    ranks = field("rank_pattern", {...: int}, {})
    alphas = field("alpha_pattern", {...: NUMBER}, {})
    _require_expressions(file, [*ranks, *alphas])
    for name, number in [
        ("r", config["r"]), ("lora_alpha", config["lora_alpha"]),
        *ranks.items(), *alphas.items(),
    ]:  # fmt: skip
        if not 0 < number < LARGEST:
            raise UserError(
                f"{file}: {name} is {number}; it must be above 0 and below {LARGEST}"
            )
    if (bias := field("bias", str, BIASES[0])) not in BIASES:
        raise UserError(
            f"{file}: bias is {bias!r}, and PEFT has {', '.join(BIASES)}; {REMEDY}"
        )
    return LoraNumbers(
        config["r"],
        config["lora_alpha"],
        ranks,
        alphas,
        field("use_rslora", bool, False),
        field("ensure_weight_tying", bool, False),
        field("base_model_name_or_path", str, ""),
        field("revision", str, ""),
        field("peft_version", str, ""),
        tuple(field("target_parameters", [str], ())),
        field("use_dora", bool, False),
        tuple(field("modules_to_save", [str], ())),
        bias,
        _targets(config),
    )


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of `LoraNumbers`; empty where other fields choose among the modules."""
    found = config.get("target_modules")
    fewer = "layers_to_transform", "exclude_modules", "target_parameters"
    is_list = isinstance(found, list) and all(isinstance(x, str) for x in found)
    return () if not is_list or any(map(config.get, fewer)) else tuple(found)


def _refuse(file: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(
            f"{file}: peft_type is {config['peft_type']!r}, and only LORA is computed "
            f"here: {MERGED}"
        )
    for name, value in config.items():
        kind = FIELDS.get(name)
        if value and kind == REFUSED:
            raise UserError(
                f"{file}: {name} is {_short(value)}, which is not computed here: "
                f"{MERGED}"
            )
        if value and kind is None:
            raise UserError(
                f"{file}: {name} is {_short(value)}, a field that is not known here "
                f"and may change what the adapter computes: {MERGED}; or remove the "
                "field, if you know that it has no effect on a trained adapter"
            )
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, so the adapter may lie over a "
            "changed base: save it again with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it one to the "
            "unchanged base"
        )


def _short(value: Any) -> str:
    return repr(value)[:80]


def _require_expressions(file: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{file}: rank_pattern or alpha_pattern has {_short(pattern)}, which "
                f"is no regular expression: {error}"
            ) from error


def written_config(
    ranks: Mapping[str, int],
    scale: float,
    *,
    parameters: Collection[str] = (),
    of_experts: int = 0,
    fan_in_fan_out: bool = False,
    tied: bool = False,
    dora: bool = False,
) -> dict[str, Any]:
    """The smallest config with which PEFT reads modules of these `ranks`.

    Those in `parameters` are no modules, but parameters that PEFT wraps.

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
        "target_modules": sorted(ranks.keys() - parameters),
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
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
    if dora:
        config["use_dora"] = True
    return config


def _whole(number: float) -> int | float:
    """A whole number as one, as some readers know no other alpha."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-12) else number
