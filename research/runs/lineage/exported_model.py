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
from research.weights.adapters.adapter_kind import with_own_patterns
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
    adapters = _adapters(config, model, split, params)
    facts = {
        "run": folder.origin().get(RUN, ""),
        "step": str(step),
        "base_model": base_name(config),
        "base_sha256": base.fingerprint,
        "base_licence": base.licence or "not known",
        "data_sha256": folder.identity().get("data", ""),
        "prompt_template": config.data.template,
        "system_prompt": system,
        "adapters": json.dumps(
            {path: {"rank": x.rank, "alpha": x.alpha} for path, x in adapters.items()}
        ),
    }
    return ExportedModel(
        model=model,
        weights=split.forward(params, frozen, None),
        tokenizer=task_registry.exported_tokenizer(config, base, system),
        adapters=adapters,
        adapter_kind=split.kind.name if split.kind else "",
        full=split.full,
        base_weights=frozen,
        base=base,
        facts=facts,
    )


def base_name(config: Config) -> str:
    """The base model without the folders of this machine."""
    start = config.model.init_from
    return public_name(start) if start else f"random {config.model.preset}"


def _adapters(
    config: Config, model: Model, split: Trainable, params: Params
) -> Mapping[str, ExportedAdapter]:
    if split.kind is None:
        return {}
    adapters = split.adapters(params)
    ranks = {path: split.kind.rank(factors) for path, factors in adapters.items()}
    lora = with_own_patterns(config.lora, model.specs)
    scales = split.kind.settings(ranks, lora).scales
    return {
        path: ExportedAdapter(factors, ranks[path], float(scales[path] * ranks[path]))
        for path, factors in adapters.items()
    }
