"""Evaluates a run on files: `python -m research.evaluate --run=RUN --data=FILE`."""

import dataclasses
import sys
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import changed, flat, knob
from research.core.errors import UserError, files_of_step
from research.core.visible_text import counted, visible

USAGE = """
python -m research.evaluate --run=RUN_DIR --data=test.jsonl [--step=best]

Prints the loss, the tokens and the perplexity of each category, of the base model and
the tuned one side by side where the run trains adapters. The rows are read as the run
reads its own: by its columns, template and seq_len. RUN_DIR/evaluations keeps the
numbers in a JSON file for each data set, way to read it and step. Files that differ
from those of the run need, for example, --config.data.columns.response=answer,
--config.text.column=body or --config.data.bad_lines=skip.
"""
# Knobs that say how files are read. Others would make another measurement.
OF_FILES = ("data.columns", "data.bad_lines", "text.column", "text.undecodable")
INSTEAD = {
    **dict.fromkeys(("data.path", "data.eval_path", "text.sources"), "data"),
    "run_dir": "run",
}
SHOWN = 4  # rows that were dropped or cut; the file has all


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    run: str = knob("", "run directory, its config.json or config file", is_path=True)
    data: str = knob(
        "",
        "rows to evaluate, as config.data.path names them, or text, as "
        "config.text.sources does with or without names; several between commas",
        is_path=True,
    )
    step: str = knob("latest", "checkpoint: latest, best, or a step number")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f, changes = command_line.parse_with_changes(
        argv, USAGE, EvaluateFlags, OF_FILES, INSTEAD
    )
    for flag, value, example in (
        ("run", f.run, "runs/finetune_dolly"),
        ("data", f.data, "test.jsonl"),
    ):
        if not value:
            raise UserError(f"--{flag} is missing, e.g. --{flag}={example}")
    from rich.console import Console

    from research.evaluate.compare_models import (
        as_json,
        evaluate_models,
        result_name,
    )
    from research.parallel import runtime
    from research.report import result_tables, terminal
    from research.runs.display_files import write_evaluation
    from research.runs.reopen import find_run
    from research.tasks.task_registry import rows_of_files

    runtime.start_alone()
    found = find_run(f.run)
    own = flat(found.config)
    changes = {name: value for name, value in changes.items() if value != own[name]}
    config = changed(found.config, changes, "--config")
    rows = rows_of_files(config, found.base, f.data)
    run = found.load(step=f.step, decodes=False)
    results = evaluate_models(run, rows)
    lines = {name: result.line() for name, result in results.items()}
    terminal.show_table(
        Console(),
        f"step {run.step} of {found.folder}, {rows.origin}",
        result_tables.compare_losses(lines),
        bold=result_tables.TOTAL,
    )
    for line in rows.unused[:SHOWN]:
        sys.stdout.write(f"unused column {visible(line)}\n")
    if rows.left_out:
        sys.stdout.write("dropped or cut:\n")
        for line in rows.left_out[:SHOWN]:
            sys.stdout.write(f"  {visible(line)}\n")
        if (more := len(rows.left_out) - SHOWN) > 0:
            sys.stdout.write(f"  and {counted(more, 'more line')} in the file below\n")
    values = {
        "step": run.step,
        "data": {"origin": rows.origin, "sha256": rows.sha256},
        "config": changes,
        "left_out": list(rows.left_out),
        "models": {name: as_json(result) for name, result in results.items()},
    }
    name = result_name(rows.sha256, changes, run.step)
    with files_of_step(None, f"the evaluation in {found.folder}"):
        path = write_evaluation(found.folder.path, name, values)
    sys.stdout.write(f"written to {path}\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)
