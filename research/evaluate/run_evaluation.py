"""One evaluation from its models and rows to its results, which are plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.visible_text import counted
from research.data.instructions.row_cache import CUT, place_of
from research.engine.requests import Sampling
from research.evaluate.answer_metrics.user_metric import content_of
from research.evaluate.answer_stage import AnswerStage
from research.evaluate.held_out_losses import Evaluation
from research.evaluate.judgement import (
    MOST_SHOWN,
    Measurements,
    find_contradictions,
)
from research.evaluate.loss_values import LOSS, LOSSES, CommonLosses, as_json
from research.evaluate.measuring.evaluated_models import (
    OF_MODEL,
    EvaluatedModel,
    ModelSet,
)
from research.evaluate.measuring.evaluated_rows import (
    EvaluatedRow,
    RowsRead,
    choose_rows,
)
from research.evaluate.measuring.kept_lines import digest
from research.evaluate.measuring.measure_models import (
    AskedRows,
    documents_of,
    measure_losses,
    measure_text_losses,
)
from research.evaluate.measuring.row_losses import (
    RowSums,
    length_label,
    loss_unit,
    same_texts,
)
from research.evaluate.measuring.seen_rows import describe_change, find_seen
from research.evaluate.multiple_choice import Choices
from research.evaluate.statistics.verdicts import BETTER, WORSE
from research.tasks.task_protocol import EvaluationRows
from research.tasks.task_registry import held_out_rows, rows_of_files

Values = dict[str, Any]
NONE, AUTO = "none", "auto"
LONGEST_SHOWN = 24  # Characters of a value in a sentence.
USUAL = Sampling(max_new_tokens=256)


@dataclasses.dataclass(frozen=True)
class EvaluationChoices:
    """The choices of the user about an evaluation, beside its models.

    Attributes:
      data: files of rows; "": the rows that the first run holds out.
      changes: knobs that say how the files are read.
      rows: how many are evaluated; 0: all.
      metrics: their names; `auto` chooses by the rows, and `none` makes no answers.
      sampling: how answers are made.
      stop: texts that end an answer.
      slots: answers at a time; 0: as many as suit the device.
    """

    data: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: int = 0
    metrics: tuple[str, ...] = (AUTO,)
    sampling: Sampling = USUAL
    stop: tuple[str, ...] = ()
    slots: int = 0


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation.

    Attributes:
      name: a digest of all that they depend on, and the step.
      values: the content of `evaluation.json`.
      rows: the lines of `rows.jsonl`: each row or text, its answers and scores.
      losses: of each model, for the table.
    """

    name: str
    values: Values
    rows: Sequence[Values]
    losses: Mapping[str, Evaluation]


def evaluate(found: ModelSet, choices: EvaluationChoices, folder: Path) -> Evaluated:
    """Evaluates models on the same rows.

    Args:
      found: the models.
      choices: of the user.
      folder: has what a call before this one has found, and gets the rest.

    Raises:
      UserError: the rows or metrics cannot be used.
      DivergedError: a loss is not finite.
      SaveError: the folder cannot be written.
    """
    readings = read_rows(found, choices)
    own = readings[found.target.name]
    if own.texts is not None:
        return _evaluate_texts(found, choices, readings, folder)
    counts = RowsRead(own)
    rows = choose_rows(counts.records(), own.groups, choices.rows)
    asked = AskedRows.of(rows, found.models, choices.sampling, choices.stop)
    data = found.config_for(found.target, choices.changes).data
    path = choices.data or data.eval_path or data.path
    data = dataclasses.replace(data, path=path)
    metrics = () if choices.metrics == (NONE,) else choices.metrics
    if not metrics:
        _require_losses(rows, own.origin)
    stage = AnswerStage.of(asked, metrics, found, data)
    seen = find_seen(found, rows)
    prompts = stage.prompts(found.models, folder, choices.slots)
    sums = measure_losses(rows, found, readings, choices.changes, folder, prompts)
    text_bytes = {row.id: row.answer_bytes for row in rows}
    common = CommonLosses.of(sums, text_bytes, loss_unit(found.target.run.config))
    categories = {row.id: row.record.category for row in rows}
    losses = {x.name: common.group(x.name, categories) for x in found.models if common}
    values = _facts(found, choices, own) | {"overlap": seen}
    values["left_out"] = counts.lines_on(rows)
    values["rows"] = (
        counts.values()
        | _count(rows, readings, common)
        | {"not_asked": stage.asked.problems}
    )
    values["models"] = {
        x.name: _model(x)
        | {"rows_with_loss": len(sums[x.name])}
        | (_parts(rows, x.name, own, common, losses[x.name]) if common else {})
        for x in found.models
    }
    lines = [_line(row, sums, stage.choices) for row in rows]
    measured = stage.measure(found, common, folder, choices.slots, prompts)
    _add_answers(values, measured, found.baseline)
    _add_lines(lines, measured)
    name = digest(
        [(x.name, x.identity) for x in found.models],
        [row.id for row in rows],
        dataclasses.replace(choices, slots=0, data=own.sha256),
        [content_of(each) for each in choices.metrics if ":" in each],
    )
    return Evaluated(_named(name, found), values, lines, losses)


def headline(result: Evaluated) -> str:
    """The result in a line, for `run.json`."""
    losses = [f"{k} {x.loss:.4f}" for k, x in result.losses.items()]
    verdicts = [
        f"{model} {values['verdict']} in {metric}"
        for model, by_metric in result.values.get("comparisons", {}).items()
        for metric, values in by_metric.items()
        if metric not in LOSSES and values["verdict"] in (BETTER, WORSE)
    ]
    loss = [f"loss {', '.join(losses)}"] if losses else []
    parts = "; ".join([*loss, *verdicts]) or "answers without references"
    values = result.values
    origin, rows = values["data"]["origin"], values.get("rows", {})
    some = rows and rows["evaluated"] < rows["read"] - rows["dropped"]
    of = f"{counted(rows['evaluated'], 'row')} of " if some else ""
    return f"evaluation, {of}{origin}: {parts}"


def read_rows(found: ModelSet, choices: EvaluationChoices) -> dict[str, EvaluationRows]:
    """The rows as each model reads them; models that read alike share them."""
    read: dict[str, EvaluationRows] = {}
    by_model = {}
    for model in found.models:
        config, base = found.config_for(model, choices.changes), model.run.base
        key = repr((config.data, base.tokenizer.fingerprint))
        if key not in read:
            read[key] = (
                rows_of_files(config, base, choices.data)
                if choices.data
                else held_out_rows(config, base)
            )
        by_model[model.name] = read[key]
    return by_model


def find_differences(found: ModelSet) -> list[str]:
    """Sentences on runs that have not ended, and on models of other kinds or rows."""
    target, said = found.target, [x.unfinished for x in found.models if x.unfinished]
    own = target.run
    for model in found.models:
        other = model.run
        parts = []
        for name in OF_MODEL:
            values = [str(getattr(x.config.data, name)) for x in (other, own)]
            if values[0] != values[1]:
                short = max(map(len, values)) <= LONGEST_SHOWN
                is_at = f" ({values[0] or NONE}, not {values[1] or NONE})" * short
                parts.append(f"another data.{name}{is_at}")
        if other.base.tokenizer.fingerprint != own.base.tokenizer.fingerprint:
            parts.append("another tokenizer")
        if other.base.fingerprint != own.base.fingerprint:
            parts.append("another base model")
        if parts:
            said.append(f"{model.name} has {', '.join(parts)} than {target.name}")
    return said


def _evaluate_texts(
    found: ModelSet,
    choices: EvaluationChoices,
    readings: Mapping[str, EvaluationRows],
    folder: Path,
) -> Evaluated:
    """Raw text has no answers: only the losses of its documents are measured."""
    if choices.metrics not in ((AUTO,), (NONE,)):
        raise UserError(
            "--metrics are of answers, and a run on raw text has none: drop the flag "
            "to get its losses"
        )
    own = readings[found.target.name]
    sums = measure_text_losses(found, readings, choices.changes, folder)
    names = [str(number) for number in range(len(own.texts.sizes))]
    text_bytes = dict(zip(names, own.texts.sizes, strict=True))
    unit = loss_unit(found.target.run.config)
    common = CommonLosses.of(sums, text_bytes, unit)
    sources = dict(zip(names, own.texts.sources, strict=True))
    losses = {x.name: common.group(x.name, sources) for x in found.models}
    values = _facts(found, choices, own) | {"overlap": find_seen(found, ())}
    values["documents"] = len(names)
    values["models"] = {
        x.name: _model(x) | as_json(losses[x.name]) for x in found.models
    }
    for name, by_row in sums.items():
        lengths = {row: length_label(int(x[LOSS][1])) for row, x in by_row.items()}
        by_length = as_json(common.group(name, lengths))["by_group"]
        values["models"][name]["by_length"] = by_length
    clusters = same_texts(own.texts)
    _add_answers(
        values, Measurements.of_texts(common, sources, clusters), found.baseline
    )
    lines = [
        {
            "row": row,
            "source": sources[row],
            "bytes": text_bytes[row],
            "models": {name: _loss(by_row, row) for name, by_row in sums.items()},
        }
        for row in names
    ]
    parts = [(x.name, x.identity) for x in found.models]
    name = digest(parts, own.sha256, dict(choices.changes))
    return Evaluated(_named(name, found), values, lines, losses)


def _named(digits: str, found: ModelSet) -> str:
    return f"{digits[:12]}-step-{found.target.step}"


def _facts(found: ModelSet, choices: EvaluationChoices, own: EvaluationRows) -> Values:
    problem = "" if choices.data else describe_change(found.target.run, own.sha256)
    return {
        "step": found.target.step,
        "data": {"origin": own.origin, "sha256": own.sha256, "problem": problem},
        "config": dict(choices.changes),
        "baseline": found.baseline,
        "differences": find_differences(found),
        "left_out": list(own.left_out),
        "unused": list(own.unused),
    }


def _model(model: EvaluatedModel) -> Values:
    return {
        "run": str(model.run.folder),
        "step": model.step,
        "identity": model.identity,
    }


def _count(
    rows: Sequence[EvaluatedRow],
    readings: Mapping[str, EvaluationRows],
    common: CommonLosses,
) -> Values:
    """How many rows are evaluated, and how many of them are not whole."""
    lines = {x for read in readings.values() for x in read.left_out}
    cut = {place_of(x) for x in lines if x.endswith(f": {CUT}")}
    with_loss = next(iter(common.sums.values()))
    return {
        "evaluated": len(rows),
        "cut": sum(row.place in cut for row in rows),
        "without_reference": sum(not row.record.has_answer for row in rows),
        "without_loss": sum(
            row.record.has_answer and row.id not in with_loss for row in rows
        ),
    }


def _require_losses(rows: Sequence[EvaluatedRow], origin: str) -> None:
    if not any(row.record.has_answer for row in rows):
        raise UserError(
            "--metrics=none measures losses, and there is none without a response, "
            f"which every row lacks ({origin}): drop the flag, or name the column with "
            "--config.data.columns.response"
        )


def _parts(
    rows: Sequence[EvaluatedRow],
    model: str,
    own: EvaluationRows,
    common: CommonLosses,
    losses: Evaluation,
) -> Values:
    """The losses over all rows, by category, by source and by length."""
    slots, documents = own.packed.documents.slots, documents_of(own, rows)
    tokens = {row: length_label(int(slots[i])) for i, row in documents.items()}
    sources = {row.id: row.source for row in rows}
    return as_json(losses) | {
        "by_source": as_json(common.group(model, sources))["by_group"],
        "by_length": as_json(common.group(model, tokens))["by_group"],
    }


def _add_answers(values: Values, measured: Measurements, baseline: str) -> None:
    """Adds what the answers of all models are worth."""
    values["metrics"] = {
        name: {
            "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
            "needs_reference": metric.needs_reference,
            "note": metric.note,
        }
        for name, metric in measured.metrics.items()
    }
    clusters = measured.clusters
    values["repeats"] = {"rows": len(clusters), "different": len({*clusters})}
    for name in measured.measured:
        values["models"][name]["answers"] = measured.answers_of(name)
    if not baseline:
        return
    values["comparisons"] = measured.comparisons(baseline)
    values["findings"] = find_contradictions(values["comparisons"])
    values["regressions"], values["gains"], values["ranked_by"] = {}, {}, {}
    for name in values["comparisons"]:
        values["ranked_by"][name], changes = measured.changes(baseline, name)
        listed = [{"row": row.id, "change": change} for change, row in changes]
        worse = [x for x in listed if x["change"] < 0]
        better = [x for x in listed[::-1] if x["change"] > 0]
        values["regressions"][name] = worse[:MOST_SHOWN]
        values["gains"][name] = better[:MOST_SHOWN]


def _line(
    row: EvaluatedRow,
    sums: Mapping[str, Mapping[str, RowSums]],
    choices: Mapping[str, Choices],
) -> Values:
    """A row and its losses, in nats per token or the unit of the objective."""
    models = {name: _loss(by_row, row.id) for name, by_row in sums.items()}
    record = row.record
    own = choices.get(row.id)
    return {
        "row": row.id,
        "place": row.place,
        "category": record.category,
        "reference": record.turns[-1].said,
        **({"choices": own.texts, "right": own.right} if own else {}),
        "models": models,
    }


def _loss(sums: Mapping[str, RowSums], row: str) -> Values:
    loss, tokens = sums.get(row, {}).get(LOSS, (0.0, 0.0))
    return {"loss": loss / tokens if tokens else None}


def _add_lines(lines: Sequence[Values], measured: Measurements) -> None:
    """Adds the answers and their scores to the rows."""
    by_row = {line["row"]: line for line in lines}
    for name, rows in measured.rows.items():
        for place, row in enumerate(rows):
            line = by_row[row.id]
            line |= {"question": row.question, "context": row.context}
            line["models"][name] |= {
                **measured.said[name][place],
                "scores": {
                    metric: each.scores[place]
                    for metric, each in measured.measured[name].items()
                    if metric != LOSS
                },
            }
