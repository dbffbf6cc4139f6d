"""The end of a run: its export, its answers, its report, and the mark of completion."""

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

from research.checkpoints.checkpoint_listing import LOSS
from research.core.errors import UserError, files_of_step
from research.engine.text_generation import (
    TextGenerator,
    base_generator,
    tuned_generator,
)
from research.evaluate.judgement import find_contradictions
from research.evaluate.statistics.verdicts import BETTER
from research.formats.export_folder import ExportFolder
from research.formats.export_format import ExportOptions, find_format
from research.formats.export_names import EXPORTED
from research.report.final_report import attempt, write_report
from research.report.model_card import format_card
from research.report.run_results import read_results
from research.runs import display_files, metrics_file
from research.runs.lineage.exported_model import exported_model
from research.runs.lineage.exported_run import REPLACE, ModelOrigin, export_model
from research.runs.lineage.proof_rows import find_rows
from research.runs.reopen import ReopenedRun
from research.tasks.model_answers import AnswerMeasure, ComparedAnswer
from research.train import run_facts
from research.train.metrics.held_out_answers import TUNED
from research.train.training_run import TrainingRun


def finish(run: TrainingRun, steps: int) -> None:
    """Writes the plot, the tables, the model's answers and the exported model.

    `steps` are the updates that the run has made.

    Raises:
      SaveError: they could not be written; the last step is saved all the same.
    """
    with files_of_step(steps, f"all {steps} steps are saved, and the report"):
        run.folder.require_present()
        _finish(run, steps)


def _export(run: TrainingRun, steps: int) -> None:
    definition, base, options = run.definition, run.base, ExportOptions()
    format = find_format("hf")
    opened = ReopenedRun(
        folder=run.folder,
        step=steps,
        config=run.config,
        base=base,
        model=definition.model,
        mesh=definition.mesh,
        trainable=definition.trainable,
        params=run.state.params,
        frozen=run.frozen,
    )
    exported = exported_model(opened)
    card = format_card(
        run.folder,
        steps,
        base.licence,
        format.usage(exported, options),
        adapters=exported.adapters,
    )
    with ExportFolder.claimed(run.folder.path / EXPORTED) as out:
        export_model(
            ModelOrigin.of(run.folder, steps, options.numbers),
            run.folder.identity(),
            exported,
            find_rows(run.folder.path, exported.tokenizer),
            out,
            format,
            options,
            card=card,
            replace=run.config.replace_export,
            flag=REPLACE,
        )


def _trained(run: TrainingRun) -> TextGenerator:
    params, tokenizer = run.state.params, run.base.tokenizer
    return tuned_generator(run.decoders, run.alike, params, run.frozen, tokenizer)


def _untrained(run: TrainingRun) -> TextGenerator | None:
    # A pack has compiled its programs with adapters. The base of a single run is faster
    # without them. Weights that were drawn are no base model, and have no answers.
    off = None
    if run.shares_programs and run.base.tensors is not None:
        off = run.alike.off(run.state.params, run.frozen)
    # After full training the base model takes the place of the trained one.
    run.state = None
    if off is not None:
        decoders, tokenizer = run.decoders, run.base.tokenizer
        return tuned_generator(decoders, run.alike, off, run.frozen, tokenizer)
    try:
        return base_generator(run.decoders, run.base, run.frozen)
    except UserError as error:
        logging.warning("the report has no answers of the base model: %s", error)
        return None


def _answer(
    run: TrainingRun, steps: int
) -> tuple[list[ComparedAnswer], list[AnswerMeasure]]:
    """Answers of both models side by side, and what all of them are worth."""
    held_out = run.answers
    if not held_out.rows:
        return [], []
    tuned = run.answered
    if not tuned or tuned.step != steps:
        tuned = held_out.answer(steps, _trained(run))
        for problem in tuned.problems:
            run.warn(problem)
    base = held_out.answer_base(lambda: _untrained(run))
    for problem in base.problems if base else ():
        run.warn(f"the base model: {problem}")
    return held_out.side_by_side(base, tuned), held_out.compare(base, tuned)


def contradictions(folder: Path, measures: Sequence[AnswerMeasure]) -> list[str]:
    """Sentences if the held-out loss of a run fell while its answers got worse."""
    lines = metrics_file.read_metrics(folder)
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    found = {
        x.name: {"baseline": x.base, "candidate": x.tuned, "verdict": x.verdict}
        for x in measures
        if x.verdict
    }
    fell = bool(losses) and losses[-1] < losses[0]
    return find_contradictions(
        {TUNED: {LOSS: {"verdict": BETTER if fell else ""}} | found}
    )


def _finish(run: TrainingRun, steps: int) -> None:
    folder = run.folder.path
    # All is saved: the moments make room for the export and the answers.
    run.state = dataclasses.replace(run.state, opt_state=None)
    # The export first: nothing that only shows results may cost it.
    if run.config.export:
        _export(run, steps)
    failed: list[str] = []
    answers = attempt("the answers", lambda: _answer(run, steps), failed) or ([], [])
    if jax.process_index() > 0:
        return
    goodput = run.history.goodput()
    metrics_file.append_line(folder, steps, "goodput", goodput.line())
    display_files.write_answers(folder, *answers, run.answers.not_asked)
    facts = attempt("the facts", lambda: run_facts.describe(run, steps), failed) or {}
    figures = attempt("the figures", lambda: run_facts.measure(run), failed) or {}
    figures["goodput"] = str(goodput)
    facts |= figures
    warnings = attempt(
        "the loss against answers", lambda: contradictions(folder, answers[1]), failed
    )
    if warnings:
        facts = {"warning": "; ".join(warnings)} | facts
    knobs = attempt(
        "the knobs",
        lambda: run_facts.changed_knobs(run.config, run.folder.config()),
        failed,
    )
    results = attempt(
        "the results",
        lambda: read_results(folder, facts, goodput.parts, knobs or []),
        failed,
    )
    if results:
        failed += write_report(run.console, folder, results)
    if failed:
        facts["missing in the report"] = "; ".join(failed)
    run.folder.mark_complete(facts)
    logging.info("%s", "  ".join(f"{k}: {v}" for k, v in figures.items()))
    logging.info(
        "done: %s/report.md, %s/report.html; talk to it with\n"
        "  python -m research.generate --run=%s%s",
        folder,
        folder,
        shlex.quote(str(folder)),
        " --compare" if run.base.tensors else "",
    )
