"""The rules that involve more than one knob."""

from typing import Any

from research.core.errors import UserError


def check_rules(c: Any) -> None:
    """Checks a `run_config.Config` whose knobs are each within their limits.

    Raises:
      UserError: two knobs contradict each other; the message names them.
    """
    if not c.model.init_from and not c.model.preset:
        raise UserError(
            "config.model.init_from and config.model.preset are both empty: name a "
            "model to start from, or the shape of a random one"
        )
    if c.data.kind == "instructions" and not c.model.init_from:
        raise UserError(
            "config.data.kind is 'instructions' and config.model.init_from is empty: "
            "instruction tuning starts from a model, whose tokenizer it uses"
        )
    if c.trainable == "lora" and not c.model.init_from:
        raise UserError(
            "config.trainable is 'lora' and config.model.init_from is empty: adapters "
            "need a trained model; use --config.trainable=full"
        )
    if c.trainable == "lora" and c.model.param_dtype != "float32":
        raise UserError(
            f"config.model.param_dtype is {c.model.param_dtype!r}: adapters are "
            "trained in float32, and frozen weights follow config.model.dtype"
        )
    if c.runtime.profile_from > c.steps:
        raise UserError(
            f"config.runtime.profile_from is {c.runtime.profile_from} and config.steps "
            f"{c.steps}: no step would be traced"
        )
    named = c.runtime.coordinator_address, c.runtime.num_processes
    if not c.runtime.distributed and (any(named) or c.runtime.process_id >= 0):
        raise UserError(
            "config.runtime.coordinator_address, num_processes or process_id is set "
            "and config.runtime.distributed is not: set it, too, to join the others"
        )
    rows = c.data.rows_per_pass
    if c.data.batch_size % rows:
        raise UserError(
            f"config.data.microbatch_size is {rows}; it must divide "
            f"config.data.batch_size, which is {c.data.batch_size}"
        )
