"""What the types of the knobs do not say: choices, ranges, what goes together."""

from typing import Any

from research.core.errors import UserError, nearest


def check(c: Any) -> None:
    """Of a `config.Config`: each knob's choices and range, and what belongs together.

    Raises:
      UserError: naming the knob.
    """
    _check_choices(c)
    _check_ranges(c)
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
    if rows < 0 or c.data.batch_size % rows:
        raise UserError(
            f"config.data.microbatch_size is {rows}; it must divide "
            f"config.data.batch_size, which is {c.data.batch_size}"
        )


def _check_choices(c: Any) -> None:
    choices = {
        "trainable": (c.trainable, ("lora", "full")),
        "data.kind": (c.data.kind, ("instructions", "text")),
        "text.undecodable": (c.text.undecodable, ("stop", "skip", "replace")),
        "optim.name": (c.optim.name, ("adamw", "adafactor", "lion", "muon")),
        "optim.schedule": (
            c.optim.schedule,
            ("cosine", "linear", "wsd", "constant"),
        ),
        "model.dtype": (c.model.dtype, ("bfloat16", "float32")),
        "model.param_dtype": (c.model.param_dtype, ("float32", "bfloat16")),
        "model.attention": (c.model.attention, ("auto", "xla", "cudnn", "splash")),
        "model.remat": (c.model.remat, ("none", "dots", "full")),
        "data.source": (c.data.source, ("dolly",)),
        "data.template": (c.data.template, ("chat", "dolly")),
        "data.overlength": (c.data.overlength, ("truncate", "drop")),
        "data.bad_lines": (c.data.bad_lines, ("stop", "skip")),
        "checkpoint.on_error": (c.checkpoint.on_error, ("stop", "go_on")),
        "runtime.progress": (c.runtime.progress, ("auto", "bar", "lines")),
    }
    for path, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(
                f"config.{path} is {value!r}; it must be one of "
                f"{', '.join(allowed)}{nearest(value, allowed)}"
            )


def _check_ranges(c: Any) -> None:
    positive = {
        "steps": c.steps,
        "lora.rank": c.lora.rank,
        "lora.alpha": c.lora.alpha,
        "model.scan_unroll": c.model.scan_unroll,
        "model.attention_block": c.model.attention_block,
        "model.loss_chunk": c.model.loss_chunk,
        "data.seq_len": c.data.seq_len,
        "data.batch_size": c.data.batch_size,
        "data.held_out": c.data.held_out,
        "optim.learning_rate": c.optim.learning_rate,
        "optim.skip_window": c.optim.skip_window,
        "runtime.slices": c.runtime.slices,
        "runtime.profile_steps": c.runtime.profile_steps,
        "text.held_out_share": c.text.held_out_share,
        "text.held_out_bytes": c.text.held_out_bytes,
        "eval.every": c.eval.every,
        "eval.max_new_tokens": c.eval.max_new_tokens,
        "data.hub_timeout": c.data.hub_timeout,
        "checkpoint.every": c.checkpoint.every,
        "checkpoint.keep_last": c.checkpoint.keep_last,
    }
    for path, value in positive.items():
        if not value > 0:
            raise UserError(f"config.{path} is {value}; it must be greater than 0")
    not_negative = {
        "seed": c.seed,
        "data.max_rows": c.data.max_rows,
        "optim.weight_decay": c.optim.weight_decay,
        "optim.clip_norm": c.optim.clip_norm,
        "optim.eps": c.optim.eps,
        "optim.z_loss": c.optim.z_loss,
        "optim.skip_spread": c.optim.skip_spread,
        "eval.prompts": c.eval.prompts,
        "eval.samples_every": c.eval.samples_every,
        "optim.rollbacks": c.optim.rollbacks,
        "checkpoint.keep_best": c.checkpoint.keep_best,
        "runtime.watchdog_s": c.runtime.watchdog_s,
        "runtime.peak_tflops": c.runtime.peak_tflops,
        "runtime.profile_from": c.runtime.profile_from,
    }
    for path, value in not_negative.items():
        if value < 0:
            raise UserError(f"config.{path} is {value}; it must not be negative")
    for path, value, top in (
        ("optim.b1", c.optim.b1, 0.9999),
        ("optim.b2", c.optim.b2, 0.9999),
        ("lora.dropout", c.lora.dropout, 0.99),
        ("optim.warmup", c.optim.warmup, 1.0),
        ("optim.decay", c.optim.decay, 1.0),
        ("optim.final", c.optim.final, 1.0),
        ("text.held_out_share", c.text.held_out_share, 0.5),
    ):
        if not 0.0 <= value <= top:
            raise UserError(f"config.{path} is {value}; it must be in 0 to {top}")
