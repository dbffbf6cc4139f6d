"""The end of a run: its export, its answers, its report, and the mark of completion."""

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

import jax

from research.core.errors import UserError, files_of_step
from research.engine.text_generation import (
    TextGenerator,
    base_generator,
    tuned_generator,
)
from research.formats.base_model import EXPORTED
from research.report.final_report import attempt, write_report
from research.report.model_card import format_card
from research.report.progress_view import duration
from research.report.run_results import read_results
from research.runs import display_files, metrics_file
from research.runs.lineage.exported_run import REPLACE, export_run
from research.tasks import task_registry
from research.tasks.epochs import passed
from research.train.training_run import TrainingRun


def finish(run: TrainingRun) -> None:
    """Writes the plot, the tables, the model's answers and the exported model.

    Raises:
      SaveError: they could not be written; the last step is saved all the same.
    """
    steps = run.config.steps
    with files_of_step(steps, f"all {steps} steps are saved, and the report"):
        run.folder.require_present()
        _finish(run)


def _trained(run: TrainingRun) -> TextGenerator:
    trainable, tokenizer = run.definition.trainable, run.base.tokenizer
    params = run.state.params
    return tuned_generator(run.sampler, trainable, params, run.frozen, tokenizer)


def _untrained(run: TrainingRun) -> TextGenerator | None:
    # After full training the base model takes the place of the trained one.
    run.state = None
    try:
        return base_generator(run.sampler, run.base, run.definition.mesh, run.frozen)
    except UserError as error:
        logging.warning("the report has no answers of the base model: %s", error)
        return None


def _finish(run: TrainingRun) -> None:
    folder = run.folder.path
    definition, base = run.definition, run.base
    # All is saved: the moments make room for the export and the answers.
    run.state = dataclasses.replace(run.state, opt_state=None)
    # The export first: nothing that only shows results may cost it.
    if run.config.export:
        export_run(
            run.folder,
            run.config.steps,
            definition.model,
            definition.trainable.forward(run.state.params, run.frozen, None),
            task_registry.exported_tokenizer(run.config, base),
            folder / EXPORTED,
            card=format_card(run.folder, run.config.steps, base.licence),
            replace=run.config.replace_export,
            flag=REPLACE,
        )
    failed: list[str] = []
    answers = attempt(
        "the answers",
        lambda: run.task.conclude(lambda: _untrained(run), lambda: _trained(run)),
        failed,
    )
    if jax.process_index() > 0:
        return
    goodput = run.history.goodput()
    metrics_file.append_line(folder, run.config.steps, "goodput", goodput.line())
    display_files.write_answers(folder, answers or [])
    facts = {
        "base model": run.base.name,
        "data": run.task.origin,
        "steps": run.config.steps,
    }
    if (passes := passed(run.config.steps, run.config, run.task.rows)) is not None:
        facts["epochs"] = round(passes, 3)
    facts |= attempt("the figures", lambda: _figures(folder), failed) or {}
    facts["goodput"] = str(goodput)
    results = attempt(
        "the results", lambda: read_results(folder, facts, goodput.parts), failed
    )
    if results:
        failed += write_report(run.console, folder, results)
    if failed:
        facts["missing in the report"] = "; ".join(failed)
    run.folder.mark_complete(facts)
    logging.info("%s", "  ".join(f"{k}: {v}" for k, v in facts.items()))
    logging.info(
        "done: %s/loss.png, %s/report.md; talk to it with\n"
        "  python -m research.generate --run=%s%s",
        folder,
        folder,
        shlex.quote(str(folder)),
        " --compare" if run.base.tensors else "",
    )


def _figures(folder: Path) -> dict[str, Any]:
    """Time, speed and memory of the run, as far as its metrics are there."""
    lines = [x for x in metrics_file.read_metrics(folder) if x["kind"] == "train"]
    if not lines:
        return {}
    seconds = lines[-1]["elapsed_s"]
    return {
        "training time": duration(seconds),
        "tokens per second": round(sum(x["tokens"] for x in lines) / seconds),
        "peak memory, GB": round(lines[-1]["memory_gb"], 2),
    }
