"""A run that continues an adapter of another tool has its targets, ranks and alphas."""

import dataclasses
import os

from research.config.field_names import shell_flag
from research.config.knob_groups import LoRAConfig
from research.config.run_config import Config
from research.core.errors import UserError
from research.formats.peft.adapter_folder import AdapterFolder
from research.models.architecture import Architecture
from research.models.transformer import Model
from research.runs.lineage.base_of_run import start_architecture
from research.runs.lineage.hub_pins import pinned
from research.runs.run_directory import RunDir

# The knobs that an adapter answers.
ANSWERED = (
    *("kind", "rslora", "layers", "targets", "rank", "alpha"),
    *("rank_pattern", "alpha_pattern", "full"),
)


def with_adapter(
    config: Config,
    folder: RunDir | None = None,
    architecture: Architecture | None = None,
) -> Config:
    """`config` with the numbers of the adapter that `config.lora.init_from` names.

    Args:
      config: of the run.
      folder: of the run. One that exists keeps the numbers that it began with, and its
        adapter may be gone.
      architecture: of the base model, if that is known already.

    Raises:
      UserError: the adapter cannot be used, is one to another base, or has other
        numbers than `config` asks for.
    """
    asked = config.lora
    if not asked.init_from or config.trainable != "lora":
        return config
    if folder and (begun := _begun_at(folder, config)):
        own = {name: getattr(begun, name) for name in ANSWERED}
        found = dataclasses.replace(asked, **own)
    else:
        architecture = architecture or start_architecture(config)
        specs, timeout = Model(architecture).specs, config.data.hub_timeout
        adapter = AdapterFolder(asked.init_from, architecture, specs, timeout)
        found = adapter.lora_config(asked)
    for name in ANSWERED:
        value, default = getattr(asked, name), getattr(LoRAConfig(), name)
        if value not in (default, getattr(found, name)):
            raise UserError(
                f"config.lora.{name} is {value!r}, and the adapter "
                f"{asked.init_from} has {getattr(found, name)!r}: remove what sets it, "
                f"or set {shell_flag(f'lora.{name}', default)}, the default, which "
                "leaves it to the adapter"
            )
    return dataclasses.replace(config, lora=found)


def _begun_at(folder: RunDir, config: Config) -> LoRAConfig | None:
    """The adapters of the run in `folder`, if it began with the one of `config`."""
    if not folder.exists:
        return None
    begun = folder.config().lora
    asked = pinned(config, folder.known_pins()).lora.init_from
    is_same = begun.init_from == asked or (
        os.path.abspath(begun.init_from) == os.path.abspath(asked)
    )
    return begun if is_same else None
