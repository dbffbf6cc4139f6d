"""The flags of `python -m research.evaluate`, read without JAX.

The studio reads them, too, before it starts the command.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError

USAGE = """
python -m research.evaluate --run=RUN_DIR [--run=RUN2 ...] [--against=base|RUN]
    [--data=test.jsonl] [--metrics=NAME ...] [--rows=200] [--step=best]

Is it better? Measures the loss of the rows and answers them with every model, through
the engine that serves: the likeliest tokens, unless a --temperature is given. Each
model is compared with the baseline on the same rows, with 95 % intervals and a verdict.
Without --data the rows are those that the first run holds out. They are read as that
run reads its own; files that differ need, for example,
--config.data.columns.response=answer, --config.text.column=body or
--config.data.bad_lines=skip.

RUN_DIR/evaluations keeps the results, and every answer as it comes: after a kill the
same command continues. An adapter of PEFT holds no rows out, so it needs --data, and
its results are kept in ./evaluations. --metrics=none measures losses alone.
docs/evaluation.md has the metrics, the statistics and the files.
"""
# Knobs that say how files are read. Others would make another measurement.
OF_FILES = ("data.columns", "data.bad_lines", "text.column", "text.undecodable")
INSTEAD = {
    **dict.fromkeys(("data.path", "data.eval_path", "text.sources"), "data"),
    "run_dir": "run",
}


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    run: tuple[str, ...] = knob(
        (),
        "run directory, RUN@STEP, a folder of runs, or an adapter of PEFT, its folder "
        "or hub://owner/name; may be repeated",
        is_path=True,
    )
    model: str = knob(
        "",
        "base of adapters of PEFT, as config.model.init_from names it; not given: "
        "that which each names",
        is_path=True,
    )
    against: str = knob(
        "",
        "what is compared with: base, or another run directory; not given: the base "
        "model of the first run, where it has one, and else the first run",
        is_path=True,
    )
    data: str = knob(
        "",
        "rows to evaluate, as config.data.path names them, or text, as "
        "config.text.sources does with or without names; several between commas; not "
        "given: the rows that the first run holds out",
        is_path=True,
    )
    step: str = knob("latest", "checkpoint: latest, best, or a step number")
    rows: int = knob(
        0, "how many rows are evaluated, drawn by a hash of their texts; 0: all", low=0
    )
    metrics: tuple[str, ...] = knob(
        ("auto",),
        "metrics of the answers, several between commas or flags: auto chooses by the "
        "rows, none makes no answers, choice_none, choice_tokens and choice_bytes "
        "score the choices of rows, module:function is your own",
    )
    max_new_tokens: int = knob(256, "longest answer, in tokens", above=0)
    temperature: float = knob(
        0.0, "0 takes the likeliest token; above 0 samples", low=0
    )
    top_p: float = knob(
        0.95, "nucleus to sample from, with a temperature", above=0, high=1
    )
    seed: int = knob(0, "seed of the samples")
    stop: tuple[str, ...] = knob(
        (), "text that ends an answer and is not part of it; may be given repeatedly"
    )
    slots: int = knob(
        0,
        "answers made at a time; 0: 32 on accelerators; on a CPU 64 of up to 512 "
        "tokens with their prompts, 32 of up to 1,024, and so on",
        low=0,
        high=256,
    )


def read_flags(argv: Sequence[str]) -> tuple[EvaluateFlags, dict[str, Any]]:
    """The flags of a command line, and the knobs that it changes by name.

    Raises:
      UserError: a flag is unknown or wrong, or none names a run.
    """
    f, changes = command_line.parse_with_changes(
        argv, USAGE, EvaluateFlags, OF_FILES, INSTEAD
    )
    if not f.run:
        raise UserError("--run is missing, e.g. --run=runs/finetune_dolly")
    if "" in f.stop:
        raise UserError("--stop is empty; it would end every answer at once")
    metrics = tuple(name for part in f.metrics for name in part.split(",") if name)
    if len(metrics) > 1 and "none" in metrics:
        raise UserError("--metrics=none makes no answers: give it alone")
    return dataclasses.replace(f, metrics=metrics), changes
