"""The model of a run at one step, as formats of `research.formats` get it."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from research.config.run_config import Config
from research.core.local_paths import public_name
from research.formats.base_model import Base
from research.formats.export_format import ExportedAdapter, ExportedModel
from research.models.transformer import Model
from research.runs.display_files import read_system
from research.runs.run_directory import RUN, RunDir
from research.tasks import task_registry
from research.tokenize.tokenizer import Tokenizer
from research.weights.adapters.adapter_kind import with_own_patterns
from research.weights.adapters.lora import LoRA
from research.weights.representations.low_rank import LowRank
from research.weights.trainable import Trainable

Params = dict[str, Any]


class OpenedModel(Protocol):
    """A model with trained parameters; the attributes are those of `ReopenedRun`."""

    config: Config
    base: Base
    model: Model
    trainable: Trainable
    params: Params
    frozen: Params


class OpenedStep(OpenedModel, Protocol):
    """That of a run at a step."""

    folder: RunDir
    step: int


def exported_model(opened: OpenedStep) -> ExportedModel:
    """The model of a run for `export_run`; nothing is computed yet."""
    config, folder = opened.config, opened.folder
    system = read_system(folder.path, config.data.system)
    facts = {
        "run": folder.origin().get(RUN, ""),
        "step": str(opened.step),
        **base_facts(config, opened.base),
        "data_sha256": folder.identity().get("data", ""),
        "prompt_template": config.data.template,
        "system_prompt": system,
    }
    tokenizer = task_registry.exported_tokenizer(config, opened.base, system)
    return with_facts(facts, tokenizer, opened)


def with_facts(
    facts: Mapping[str, str], tokenizer: Tokenizer, opened: OpenedModel
) -> ExportedModel:
    """A model that may belong to no run; nothing is computed yet.

    `facts` and `tokenizer` travel in the files.
    """
    split, frozen = opened.trainable, opened.frozen
    weights = split.forward(opened.params, frozen, None)
    kind, adapters = _adapters(opened, weights)
    shown = {path: {"rank": x.rank, "alpha": x.alpha} for path, x in adapters.items()}
    return ExportedModel(
        model=opened.model,
        weights=weights,
        tokenizer=tokenizer,
        adapters=adapters,
        adapter_kind=kind,
        full=split.full,
        base_weights=frozen,
        base=opened.base,
        facts={**facts, "adapters": json.dumps(shown)},
    )


def base_facts(config: Config, base: Base) -> dict[str, str]:
    """The facts about the base model."""
    return {
        "base_model": base_name(config),
        "base_sha256": base.fingerprint,
        "base_licence": base.licence or "not known",
    }


def base_name(config: Config) -> str:
    """The base model without the folders of this machine."""
    start = config.model.init_from
    return public_name(start) if start else f"random {config.model.preset}"


def _adapters(
    opened: OpenedModel, weights: Params
) -> tuple[str, Mapping[str, ExportedAdapter]]:
    """The kind of the adapters, and those of each path.

    Every kind whose leaf is a low-rank update is `lora` to other tools.
    """
    split = opened.trainable
    if split.kind is None:
        return "", {}
    own = split.adapters(opened.params)
    lora = with_own_patterns(opened.config.lora, opened.model.specs)
    scales = split.kind.settings(split.kind.ranks(own), lora).scales
    kind, found = split.kind.name, {}
    for path, factors in own.items():
        leaf, rank = weights[path], split.kind.update_rank(factors)
        if type(leaf) is LowRank:
            kind, factors = LoRA.name, {"a": leaf.a, "b": leaf.b}
        found[path] = ExportedAdapter(factors, rank, float(scales[path] * rank))
    return kind, found
