"""The rules that involve more than one knob. Each is checked, and `--help` shows it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.core.errors import UserError

# Takes a `run_config.Config`, returns the error message or an empty text.
Check = Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule across knobs.

    Attributes:
      knobs: paths of the knobs that it involves.
      meaning: the rule in one sentence.
      check: returns a message that names the knobs and the remedy if it is broken.
    """

    knobs: tuple[str, ...]
    meaning: str
    check: Check


RULES: list[Rule] = []


def rule(*knobs: str) -> Callable[[Check], Check]:
    """Adds a check to `RULES`; its docstring is the meaning."""

    def add(check: Check) -> Check:
        RULES.append(Rule(knobs, " ".join((check.__doc__ or "").split()), check))
        return check

    return add


def check_rules(config: Any) -> None:
    """Checks a `run_config.Config` whose knobs are each within their limits.

    Raises:
      UserError: knobs contradict each other; the message names them.
    """
    for each in RULES:
        if broken := each.check(config):
            raise UserError(broken)


@rule("model.init_from", "model.preset")
def _a_model_is_named(config: Any) -> str:
    """One of the two names a model."""
    if config.model.init_from or config.model.preset:
        return ""
    return (
        "config.model.init_from and config.model.preset are both empty: name a "
        "model to start from, or the shape of a random one"
    )


@rule("data.kind", "model.init_from")
def _instructions_start_from_a_model(config: Any) -> str:
    """Instruction tuning starts from a model, whose tokenizer it uses."""
    if config.data.kind != "instructions" or config.model.init_from:
        return ""
    return (
        "config.data.kind is 'instructions' and config.model.init_from is empty: "
        "instruction tuning starts from a model, whose tokenizer it uses"
    )


@rule("trainable", "model.init_from")
def _adapters_need_a_model(config: Any) -> str:
    """Adapters need a trained model."""
    if config.trainable != "lora" or config.model.init_from:
        return ""
    return (
        "config.trainable is 'lora' and config.model.init_from is empty: adapters "
        "need a trained model; use --config.trainable=full"
    )


@rule("trainable", "model.param_dtype")
def _adapters_are_float32(config: Any) -> str:
    """Adapters are trained in float32."""
    if config.trainable != "lora" or config.model.param_dtype == "float32":
        return ""
    return (
        f"config.model.param_dtype is {config.model.param_dtype!r}: adapters are "
        "trained in float32, and frozen weights follow config.model.dtype"
    )


@rule("runtime.profile_from", "steps")
def _a_traced_step_exists(config: Any) -> str:
    """The first traced step is a step of the run."""
    if config.runtime.profile_from <= config.steps:
        return ""
    return (
        f"config.runtime.profile_from is {config.runtime.profile_from} and "
        f"config.steps {config.steps}: no step would be traced"
    )


@rule(
    "runtime.distributed",
    "runtime.coordinator_address",
    "runtime.num_processes",
    "runtime.process_id",
)
def _processes_are_joined(config: Any) -> str:
    """Address, number of processes and number of this one need `distributed`."""
    runtime = config.runtime
    named = runtime.coordinator_address or runtime.num_processes
    if runtime.distributed or not (named or runtime.process_id >= 0):
        return ""
    return (
        "config.runtime.coordinator_address, num_processes or process_id is set and "
        "config.runtime.distributed is not: set it, too, to join the others"
    )


@rule("data.microbatch_size", "data.batch_size")
def _microbatches_fill_a_batch(config: Any) -> str:
    """The micro-batch divides the batch."""
    rows = config.data.rows_per_pass
    if config.data.batch_size % rows == 0:
        return ""
    return (
        f"config.data.microbatch_size is {rows}; it must divide "
        f"config.data.batch_size, which is {config.data.batch_size}"
    )
