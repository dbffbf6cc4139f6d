"""The whole config of a run, its form as a `ConfigDict`, and its differences.

Config files and the command line use `ml_collections.ConfigDict`; below the doors
there are only frozen dataclasses. `defaults()` makes the first from the second,
`from_config_dict` the second from the first. Both are strict: an unknown field, a
missing field or a value of another type is an error with the nearest name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from research.config.choices import SHARE_BASE
from research.config.cross_knob_rules import check_effects, check_rules, idle
from research.config.data_knobs import DataConfig, TextConfig
from research.config.knob_groups import (
    CheckpointConfig,
    EvalConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
)
from research.config.knobs import (
    build,
    changed,
    check_limits,
    facts_of,
    fields,
    free_knob,
    knob,
    to_config_dict,
)
from research.core.errors import UserError

if TYPE_CHECKING:
    import ml_collections

BY_EPOCHS, DEFAULT_STEPS = -1, 100  # of `Config.steps`


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole config: what no group holds, and the groups."""

    run_dir: str = knob(
        "", "folder of this run: config, metrics, checkpoints, report", is_path=True
    )
    trainable: str = knob(
        "lora",
        "what is trained; lora: adapters of config.lora; full: every parameter",
        choices=("lora", "full"),
    )
    export: bool = free_knob(
        False, "at the end, write the model as a Hugging Face folder"
    )
    replace_export: bool = free_knob(
        False, "with export: replace the model of another step in the folder"
    )
    accept: tuple[str, ...] = free_knob(
        (),
        "what a resumed run may change, as ('data', 'seed'): base model, tokenizer, "
        "data, or knobs by name; recorded in run.json",
    )
    steps: int = knob(
        BY_EPOCHS,
        "optimizer updates of the whole run; -1: as many as config.epochs takes, or "
        f"{DEFAULT_STEPS} without it",
        low=BY_EPOCHS,
    )
    epochs: float = knob(
        0.0,
        "passes over the training rows, in place of steps: 3, or 0.5; 0: not used",
        low=0,
        high=1_000_000,
    )
    seed: int = knob(
        0, "seed of initialisation, split, packing, order and dropout", low=0
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)

    @property
    def evaluates(self) -> bool:
        """Whether it asks for held-out rows; an added task decides by itself."""
        data = self.data
        asked = {
            "instructions": data.held_out != 0 or data.eval_path != "",
            "text": self.text.held_out_share != 0,
        }
        return asked.get(data.kind, True)

    @property
    def is_adapter(self) -> bool:
        """Whether it trains adapters alone, and such that many share one base."""
        can_share = self.trainable == "lora" and self.lora.kind in SHARE_BASE
        return can_share and not self.lora.full

    def __post_init__(self) -> None:
        if self.steps == BY_EPOCHS and not self.epochs:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        check_limits(self, "config.")
        check_rules(self)


def defaults() -> "ml_collections.ConfigDict":
    """All knobs at their defaults, locked: config files change what differs."""
    config = to_config_dict(Config())
    config.steps = BY_EPOCHS  # Not yet asked for: `epochs` may be, in its place.
    return config.lock()


def from_config_dict(config: "ml_collections.ConfigDict") -> Config:
    """The frozen form.

    Raises:
      UserError: a field is unknown, missing, of another type or out of range.
    """
    return build(Config, config.to_dict(), "config")


def with_length(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes`, in which epochs take the place of the steps of `config`, or the
    reverse: a sweep or a list of runs may vary either.
    """
    if changes.get("epochs") and "steps" not in changes:
        return {**changes, "steps": BY_EPOCHS}
    if changes.get("steps", BY_EPOCHS) != BY_EPOCHS and config.epochs:
        return {"epochs": 0.0, **changes}
    return dict(changes)


def with_effect(
    config: Config,
    changes: Mapping[str, Any],
    where: str,
    resumed: Sequence[Config] = (),
) -> Config:
    """`config` with other values of some knobs, all of which have an effect.

    `resumed`: see `check_effects`.

    Raises:
      UserError: as `changed` and `check_effects`; it begins with `where`.
    """
    made = changed(config, with_length(config, changes), where)
    try:
        check_effects(made, Config(), resumed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return made


def hyperparameters(config: Config) -> dict[str, Any]:
    """The knobs that decide a run's numbers, by name; a resumed run keeps them."""
    return {
        path: value
        for path, field, value in fields(config)
        if facts_of(field).fixed and path != "run_dir"
    }


def fixed_differences(old: Config, new: Config) -> dict[str, str]:
    """The hyperparameters that differ, as `old -> new` by name.

    A knob that has no effect in either may change.
    """
    before, free = hyperparameters(old), idle(old).keys() & idle(new).keys()
    return {
        path: f"{before[path]!r} -> {value!r}"
        for path, value in hyperparameters(new).items()
        if before[path] != value and path not in free
    }
