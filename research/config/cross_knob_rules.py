"""The rules that involve more than one knob. Each is checked, and `--help` shows it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.config.knobs import flat
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule across knobs.

    Attributes:
      meaning: the rule and its remedy. An error says it after the knobs' values.
      holds: whether a `run_config.Config` keeps the rule.
    """

    knobs: tuple[str, ...]
    meaning: str
    holds: Callable[[Any], bool]


RULES = (
    Rule(
        ("model.init_from", "model.preset"),
        "one of them names a model to start from, or the shape of a random one",
        lambda c: bool(c.model.init_from or c.model.preset),
    ),
    Rule(
        ("data.kind", "model.init_from"),
        "instruction tuning starts from a model, whose tokenizer it uses",
        lambda c: c.data.kind != "instructions" or bool(c.model.init_from),
    ),
    Rule(
        ("trainable", "model.init_from"),
        "adapters need a trained model; without one use --config.trainable=full",
        lambda c: c.trainable != "lora" or bool(c.model.init_from),
    ),
    Rule(
        ("trainable", "model.param_dtype"),
        "adapters are trained in float32, and frozen weights follow config.model.dtype",
        lambda c: c.trainable != "lora" or c.model.param_dtype == "float32",
    ),
    Rule(
        ("runtime.profile_from", "steps"),
        "the first step to trace is a step of the run",
        lambda c: c.runtime.profile_from <= c.steps,
    ),
    Rule(
        (
            "runtime.distributed",
            "runtime.coordinator_address",
            "runtime.num_processes",
            "runtime.process_id",
        ),
        "set distributed, too, to join the processes that the others describe",
        lambda c: bool(
            c.runtime.distributed
            or (
                not c.runtime.coordinator_address
                and c.runtime.num_processes == 0
                and c.runtime.process_id == -1
            )
        ),
    ),
    Rule(
        ("data.microbatch_size", "data.batch_size"),
        "the micro-batch must divide the batch",
        lambda c: c.data.batch_size % c.data.rows_per_pass == 0,
    ),
)


def check_rules(config: Any) -> None:
    """Checks a `run_config.Config` whose knobs are each within their limits.

    Raises:
      UserError: knobs contradict each other; the message names them.
    """
    values = flat(config)
    for rule in RULES:
        if not rule.holds(config):
            found = ", ".join(
                f"config.{knob} is {values[knob]!r}" for knob in rule.knobs
            )
            raise UserError(f"{found}: {rule.meaning}")
