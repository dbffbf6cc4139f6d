"""The model of a run at one step, as formats of `research.formats` get it."""

import json
from collections.abc import Mapping
from typing import Any

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


def exported_model(
    folder: RunDir,
    step: int,
    config: Config,
    base: Base,
    model: Model,
    split: Trainable,
    params: Params,
    frozen: Params,
) -> ExportedModel:
    """The model for `export_run`; nothing is computed yet.

    Args:
      folder: of the run.
      step: the updates that `params` hold.
      config: of the run.
      base: that its training began with.
      model: the decoder on its mesh.
      split: into trained and frozen parameters.
      params, frozen: as `split` describes them.
    """
    system = read_system(folder.path, config.data.system)
    facts = {
        "run": folder.origin().get(RUN, ""),
        "step": str(step),
        **base_facts(config, base),
        "data_sha256": folder.identity().get("data", ""),
        "prompt_template": config.data.template,
        "system_prompt": system,
    }
    tokenizer = task_registry.exported_tokenizer(config, base, system)
    return with_facts(facts, tokenizer, config, base, model, split, params, frozen)


def with_facts(
    facts: Mapping[str, str],
    tokenizer: Tokenizer,
    config: Config,
    base: Base,
    model: Model,
    split: Trainable,
    params: Params,
    frozen: Params,
) -> ExportedModel:
    """A model that may belong to no run; nothing is computed yet.

    `facts` and `tokenizer` travel in the files; see `exported_model` for the others.
    """
    weights = split.forward(params, frozen, None)
    kind, adapters = _adapters(config, model, split, params, weights)
    shown = {path: {"rank": x.rank, "alpha": x.alpha} for path, x in adapters.items()}
    return ExportedModel(
        model=model,
        weights=weights,
        tokenizer=tokenizer,
        adapters=adapters,
        adapter_kind=kind,
        full=split.full,
        base_weights=frozen,
        base=base,
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
    config: Config, model: Model, split: Trainable, params: Params, weights: Params
) -> tuple[str, Mapping[str, ExportedAdapter]]:
    """The kind of the adapters, and those of each path.

    Every kind whose leaf is a low-rank update is `lora` to other tools.
    """
    if split.kind is None:
        return "", {}
    own = split.adapters(params)
    lora = with_own_patterns(config.lora, model.specs)
    scales = split.kind.settings(split.kind.ranks(own), lora).scales
    kind, found = split.kind.name, {}
    for path, factors in own.items():
        leaf, rank = weights[path], split.kind.update_rank(factors)
        if type(leaf) is LowRank:
            kind, factors = LoRA.name, {"a": leaf.a, "b": leaf.b}
        found[path] = ExportedAdapter(factors, rank, float(scales[path] * rank))
    return kind, found
