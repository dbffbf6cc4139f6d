"""Evaluates runs on rows: `python -m research.evaluate --run=RUN --data=FILE`."""

import logging
import sys
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import flat
from research.core.errors import files_of_step
from research.core.standard_streams import said_once
from research.evaluate.evaluate_flags import read_flags


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f, changes = read_flags(argv)
    from research.engine.requests import Sampling
    from research.evaluate.measuring.evaluated_models import (
        find_models,
        require_held_out,
    )
    from research.evaluate.measuring.kept_lines import KeptLines, digest
    from research.evaluate.run_evaluation import EvaluationChoices, evaluate, headline
    from research.parallel import runtime
    from research.report import evaluation_page
    from research.runs.display_files import EVALUATIONS, write_evaluation
    from research.runs.run_history import add_event

    runtime.start_alone()
    found = find_models(f.run, f.against, f.step, f.model)
    target = found.target.run
    if not f.data:
        require_held_out(found)
    own = flat(target.config)
    choices = EvaluationChoices(
        data=f.data,
        changes={k: value for k, value in changes.items() if value != own[k]},
        rows=f.rows,
        metrics=f.metrics,
        sampling=Sampling(
            temperature=f.temperature,
            top_p=f.top_p,
            max_new_tokens=f.max_new_tokens,
            seed=f.seed,
        ),
        stop=f.stop,
        slots=f.slots,
    )
    folder = found.place
    # A second command that does the same ends here, and not after its first answers.
    models = [(x.name, x.identity) for x in found.models]
    command = KeptLines.opened(folder / EVALUATIONS, "command", digest(models, choices))
    with said_once(), command:
        result = evaluate(found, choices, folder / EVALUATIONS)
    lines = {name: found.line() for name, found in result.losses.items()}
    evaluation_page.show_evaluation(result.values, lines)
    with files_of_step(None, f"the evaluation in {folder}"):
        pages = evaluation_page.format_pages(result.values, result.rows, lines)
        path = write_evaluation(folder, result.name, result.values, result.rows, pages)
    of_run = folder == target.folder.path
    if of_run and not add_event(folder, headline(result), evaluation=result.name):
        logging.warning(
            "run.json keeps no line of this, because a process trains the run"
        )
    sys.stdout.write(f"written to {path}\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)
