"""An evaluation for people: tables in the terminal, `evaluation.md` and `.html`.

The values are those of `evaluation.json`, and the rows those of `rows.jsonl`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from research.core.text_templates import fill
from research.core.visible_text import counted, visible
from research.data.grouped_values import group_fields
from research.report import result_tables
from research.report.markdown_text import escaped, fenced, format_table
from research.report.result_tables import SAME, Table, text_columns
from research.report.run_page import FOLDED, PREVIEW, STYLED, TEMPLATES
from research.report.terminal import show_table

Values = Mapping[str, Any]
NONE = "-"
LOSSES = ("loss", "bits_per_byte")  # Whichever the models can be compared by.
# Verdicts without a difference, and the words before the metrics.
UNSHOWN = {
    "no difference shown": "no difference is shown in",
    "too few rows to tell": "there are too few rows to tell in",
}
NO_REFERENCE = "without a reference, in no loss and in no metric that needs one"
LEAST_P = 0.001  # Smaller ones are only said to be smaller.
SHOWN = 4  # rows that were dropped or cut, and columns; the file has all


def show_evaluation(values: Values, losses: Values) -> None:
    """Prints the findings and the tables.

    Args:
      values: of `evaluation.json`.
      losses: for each model a line as in `metrics.jsonl`.
    """
    console = Console()
    for finding in values.get("findings", ()):
        console.print(Text(visible(finding), "bold yellow"))
    for sentence in verdict_sentences(values):
        console.print(Text(visible(sentence), "bold"))
    console.print(Text(visible(described(values)), "dim"))
    table = tabulate_losses(values, losses)
    show_table(console, "losses", table, bold=result_tables.TOTAL)
    show_table(console, "metrics", tabulate_answers(values, short=True), bold="")
    for line in row_facts(values):
        console.print(Text(visible(line)))
    for line in values["unused"][:SHOWN]:
        console.print(Text(visible(f"unused column {line}")))
    left_out = values["left_out"]
    if left_out:
        lines = ["dropped or cut:", *(f"  {line}" for line in left_out[:SHOWN])]
        if (more := len(left_out) - SHOWN) > 0:
            lines.append(f"  and {counted(more, 'more line')} in evaluation.json")
        for line in lines:
            console.print(Text(visible(line)))


def described(values: Values) -> str:
    """The rows that were evaluated, the step, and the model to compare with."""
    rows = values.get("rows", {})
    count = rows.get("evaluated", values.get("documents", 0))
    whole = values["data"]["origin"]
    parts = [f"{counted(count, _unit(values))}: {whole}", f"step {values['step']}"]
    if values["baseline"]:
        parts.append(f"every model is compared with {values['baseline']}")
    return "; ".join(parts)


def _unit(values: Values) -> str:
    return "row" if "rows" in values else "document"


def verdict_sentences(values: Values) -> list[str]:
    """A sentence on each comparison: its verdicts, by how much, on how many rows."""
    if not values["baseline"]:
        return ["There is no other model to compare with, so there is no verdict."]
    sentences, unit = [], _unit(values)
    for model, by_metric in values.get("comparisons", {}).items():
        by_verdict: dict[str, list[str]] = {}
        most = max((x["rows"] for x in by_metric.values()), default=0)
        for metric, judged in by_metric.items():
            values_of = [_number(judged[x]) for x in ("baseline", "candidate")]
            rows = judged["rows"]
            on = f" on {counted(rows, unit)}" * (rows < most)
            change = f" (from {' to '.join(values_of)}{on})"
            name = metric if judged["verdict"] in UNSHOWN else metric + change
            by_verdict.setdefault(judged["verdict"], []).append(name)
        order = sorted(by_verdict, key=[*UNSHOWN].__contains__)
        parts = [f"{UNSHOWN.get(x, f'{x} in')} {_listed(by_verdict[x])}" for x in order]
        found = "; ".join(parts) or "they have no metric in common"
        who = f"{model} against {values['baseline']}"
        sentences.append(f"{who}, on {counted(most, unit)}: {found}.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`; with few names and a number where there are many."""
    shown = [*names[:SHOWN]]
    if (more := len(names) - SHOWN) > 0:
        shown.append(f"{more:,} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def row_facts(values: Values) -> list[str]:
    """Sentences about rows that are not whole, were not asked, or are known."""
    rows, problem = values.get("rows", {}), values["data"].get("problem")
    total, without = rows.get("evaluated", 0), rows.get("without_loss", 0)
    parts = (
        (rows.get("cut", 0), "with a shorter context, to fit data.seq_len"),
        (rows.get("without_reference", 0), NO_REFERENCE),
        (without, _without_loss(values) if without else ""),
        (len(rows.get("not_asked", ())), "too long to be answered"),
    )
    facts = [problem] if problem else []
    if dropped := rows.get("dropped", 0):
        share = f"{counted(rows['read'], 'row')} ({dropped / rows['read']:.1%})"
        facts.append(f"{dropped:,} of {share} dropped when they were read")
    facts += [
        f"{count:,} of {counted(total, 'row')} ({count / total:.1%}): {what}"
        for count, what in parts
        if count
    ]
    repeats = values.get("repeats", {"rows": 0, "different": 0})
    if repeats["different"] < repeats["rows"]:
        count, different = repeats["rows"], repeats["different"]
        unit = _unit(values)
        facts.append(
            f"{counted(count, unit)} are {counted(different, f'different {unit}')}: "
            f"{unit}s that repeat count once"
        )
    facts += values["differences"]
    if any("bits_per_byte" in x for x in values.get("comparisons", {}).values()):
        facts.append(
            "the models count other tokens, so that their losses per token say nothing "
            "about each other: bits per byte of the answers are compared"
        )
    for model, seen in values.get("overlap", {}).items():
        same, part = seen["exact"], seen["words"]
        if same or part:
            facts.append(
                f"{model} has seen {same + part:,} of {counted(total, 'row')} in "
                f"training: {same:,} by the whole prompt, and {part:,} by a run of 13 "
                "words"
            )
        elif not seen["problem"]:
            read = counted(seen["training_rows"], "training row")
            facts.append(f"{model} has seen no row in training ({read} compared)")
        if seen["problem"]:
            facts.append(f"{model}: training rows not compared: {seen['problem']}")
    return [*facts, *_metrics_without_rows(values)]


def _metrics_without_rows(values: Values) -> Iterator[str]:
    """Metrics that a model has no row for are in no table, and are named here."""
    compared = values.get("comparisons", {})
    for metric in values.get("metrics", {}):
        for model in compared or values["models"]:
            answers = values["models"][model].get("answers", {})
            if compared and metric not in compared[model]:
                both = f"both {values['baseline']} and {model}"
                yield f"{metric} has no row in which it applies to answers of {both}"
            elif not compared and answers.get(metric, {}).get("value") is None:
                yield f"{metric} has no row in which it applies to the answer"


def tabulate_losses(values: Values, losses: Values) -> Table:
    """The losses of all models: by category, or by source where texts are whole."""
    kind = result_tables.CATEGORY if "rows" in values else result_tables.SOURCE
    return result_tables.compare_losses(losses, kind) if losses else []


def loss_lines(values: Values) -> dict[str, Values]:
    """The losses in `evaluation.json` as lines of `metrics.jsonl`, by model."""
    lines: dict[str, Values] = {}
    for model, found in values["models"].items():
        if "loss" not in found:  # No row has a reference.
            continue
        lines[model] = {
            "loss": found["loss"],
            "loss_unit": found["loss_unit"],
            **{x: found[x] for x in ("bits_per_byte",) if x in found},
            **found["metrics"],
            "metrics": ",".join(x for x in found["metrics"] if "/" not in x),
        }
        for name in ("loss", "tokens", "bits_per_byte"):
            groups = found["by_group"].items()
            by_group = {group: x[name] for group, x in groups if name in x}
            lines[model] |= group_fields(name, by_group)
    return lines


def _without_loss(values: Values) -> str:
    """Which models have no loss of some rows, and for which rows that counts."""
    rows = values["rows"]
    total = rows["evaluated"] - rows.get("without_reference", 0)
    models = values["models"].items()
    short = [name for name, x in models if x.get("rows_with_loss", total) < total]
    of_whom = " or ".join(short)
    return f"longer than data.seq_len of {of_whom}, and in no loss of any model"


def tabulate_answers(values: Values, *, short: bool = False) -> Table:
    """A row for each metric of each model; empty where nothing was answered.

    `short` has what fits into a terminal. A model that is compared stands beside the
    baseline; one alone has its own interval.
    """
    models, compared = values["models"], values.get("comparisons", {})
    named = len(compared) > 1 or not compared
    rows = []
    for metric in (*LOSSES, *values.get("metrics", {})):
        for model in compared or models:
            own = models[model].get("answers", {}).get(metric, {})
            judged = compared.get(model, {}).get(metric, {})
            name = [metric, *[model] * named]
            if judged:
                rows.append([*name, *_compared(judged, short)])
            elif not compared and own.get("value") is not None:
                cells = [_rows(own), _number(own["value"]), _interval(own)]
                rows.append([*name, *cells])
    if not rows:
        return []
    header = ["metric", *["model"] * named, f"{_unit(values)}s"]
    if not compared:
        return [[*header, "value", "95 %"], *rows]
    header += [values["baseline"], "model" if named else next(iter(compared))]
    header += ["change, 95 %"]
    if not short:
        header += ["p (Holm)", "effect", "rows to tell"]
    return [[*header, "verdict"], *rows]


def tabulate_categories(values: Values) -> Table:
    """The change of each metric in each category; empty without categories.

    A metric in which no row of a category differs is no line.
    """
    group = result_tables.CATEGORY if "rows" in values else result_tables.SOURCE
    header = [group, "metric", "model", f"{_unit(values)}s", "baseline", "value"]
    header += ["change", "95 % interval"]
    rows = []
    for model, by_metric in values.get("comparisons", {}).items():
        for metric, judged in by_metric.items():
            for category, each in judged["by_category"].items():
                if each and each["differing"]:
                    name = result_tables.group_label(category or "(none)", group)
                    cells = [name, metric, model, _rows(each)]
                    cells += [_number(each["baseline"]), _number(each["candidate"])]
                    cells += [_signed(each["difference"]), _interval(each, signed=True)]
                    rows.append(cells)
    return [header, *sorted(rows)] if rows else []


def format_pages(
    values: Values, rows: Sequence[Values], losses: Values
) -> dict[str, str]:
    """The texts of `evaluation.md` and `evaluation.html`."""
    by_row = {row["row"]: row for row in rows}
    changed = [
        (title, model, [(x["change"], by_row[x["row"]]) for x in found])
        for title, model, found in changed_rows(values)
    ]
    return {
        f"evaluation.{ending}": fill(
            TEMPLATES / f"evaluation.{ending}.jinja",
            lambda value: visible(value) if type(value) is str else value,
            filters={
                "literal": lambda value: escaped(str(value)),
                "fenced": fenced,
                "words": text_columns,
                "lines": lambda table: "\n".join(format_table(table)[1:]),
            },
            autoescape=ending == "html",
            base=STYLED,
            values=values,
            losses=tabulate_losses(values, losses),
            answers=tabulate_answers(values),
            categories=tabulate_categories(values),
            verdicts=verdict_sentences(values),
            described=described(values),
            facts=row_facts(values),
            changed=changed,
            answer_text=answer_text,
            expected_text=expected_text,
            folded=FOLDED,
            preview=PREVIEW,
        )
        for ending in ("md", "html")
    }


def changed_rows(values: Values) -> list[tuple[str, str, Sequence[Values]]]:
    """`(title, model, rows)` of the rows that changed most, regressions first."""
    found = []
    for title, key in (("Worst regressions", "regressions"), ("Best gains", "gains")):
        for model, rows in values.get(key, {}).items():
            by = values.get("ranked_by", {}).get(model)
            found.append((f"{title} by {by}" if by else title, model, rows))
    return [each for each in found if each[2]]


def answer_text(row: Values, model: str) -> str:
    """The answer of a model and its choices; its loss if it has neither."""
    each = row["models"][model]
    texts = {k: row["choices"][place] for k, place in each.get("chosen", {}).items()}
    if len({*texts.values()}) == 1:
        chosen = [next(iter(texts.values()))]
    else:
        chosen = [f"{name}: {text}" for name, text in texts.items()]
    said = [*([each["answer"]] if "answer" in each else []), *chosen]
    if not said and each.get("loss") is not None:
        return f"loss {_number(each['loss'])}"
    return "\n".join(said)


def expected_text(row: Values) -> str:
    """The right choice where a row has choices, or else its reference."""
    return row["choices"][row["right"]] if "choices" in row else row["reference"]


def _compared(judged: Values, short: bool) -> list[str]:
    values = (judged["baseline"], judged["candidate"])
    cells = [_rows(judged), *map(_number, values)]
    change = _signed(judged["difference"]) if judged["differing"] else SAME
    interval = _interval(judged, signed=True) if judged["differing"] else NONE
    cells.append(change if interval == NONE else f"{change} ({interval})")
    if not short:
        effect, needed = judged["effect_size"], judged["rows_needed"]
        p_value = judged["adjusted_p"]
        cells.append(f"{p_value:.3f}" if p_value >= LEAST_P else f"< {LEAST_P}")
        cells.append(NONE if effect is None else f"{effect:+.2f}")
        cells.append(NONE if needed is None else f"{needed:,}")
    return [*cells, judged["verdict"]]


def _rows(found: Values) -> str:
    rows, different = found["rows"], found["clusters"]
    return f"{rows:,}" + f" ({different:,} different)" * (different < rows)


def _interval(found: Values, *, signed: bool = False) -> str:
    if found.get("low") is None:
        return NONE
    write = _signed if signed else _number
    return f"{write(found['low'])} to {write(found['high'])}"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"
