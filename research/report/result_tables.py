"""The tables of a report as rows of words, for the terminal and for Markdown."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.data.grouped_values import NATS_PER_TOKEN, UNNAMED, by_group
from research.tasks.findings import Finding
from research.tasks.model_answers import AnswerMeasure

CATEGORY, SOURCE = "category", "source"
TOTAL = "all"  # A label that no group has.
Table = list[list[str]]  # A header, and a row below it for each group or phase.
SAME = "the same"  # In place of a change where no row differs.
# A number, which may have an interval behind it, or the lack of one.
NUMBER = re.compile(rf"[-+]?\d[\d,.]*%?( \(.*\)| to .*)?|-|{SAME}|")
MOST_WITH_PERPLEXITY = 2  # Models: the table of more would be too wide.
LARGEST_EXPONENT = 700  # `math.exp` overflows a little above it.


def text_columns(table: Table) -> set[int]:
    """The columns that hold words, which begin at the left; numbers end at the right.

    The first column has the names of the rows.
    """
    _, *rows = table
    words = {
        number
        for row in rows
        for number, cell in enumerate(row)
        if not NUMBER.fullmatch(str(cell))
    }
    return {0, *words}


def is_text(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are bits per byte: whole texts were evaluated, or their answers."""
    return bool(evaluations) and evaluations[-1].get("bits_per_byte") is not None


def group_kind(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The word for one group of what was evaluated."""
    return SOURCE if is_text(evaluations) else CATEGORY


def group_label(group: str, kind: str) -> str:
    """A group's name for people, `all (category)` where `all` would be the total."""
    return f"{group} ({kind})" if group == TOTAL else group


def loss_unit(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The unit of the losses, as the objective gives it; empty without evaluations."""
    return evaluations[-1].get("loss_unit", NATS_PER_TOKEN) if evaluations else ""


def tabulate_losses(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """Losses and metrics by group, first and last; empty without evaluations.

    A loss in nats per token has a perplexity, too. The table has every metric that the
    evaluations name. `evaluations` are the lines of kind `eval` in `metrics.jsonl`.
    """
    if not evaluations:
        return []
    before, last = comparable(evaluations)[0], evaluations[-1]
    first = "start" if is_text(evaluations) else "base"
    if step := before["step"]:  # The data is newer than the run.
        first = f"step {step}"
    return compare_losses({first: before, "tuned": last})


def compare_losses(lines: Mapping[str, Mapping[str, Any]], kind: str = "") -> Table:
    """Losses and metrics by group of one model, or of several side by side.

    `lines` are evaluations of the same rows, as in `metrics.jsonl`, by model, and
    `kind` is the word for a group. Losses of models that count other tokens say
    nothing about each other: bits per byte then stand for their changes.
    """
    each = list(lines.values())
    kind = kind or group_kind(each)
    in_nats = loss_unit(each) == NATS_PER_TOKEN
    has_perplexity = in_nats and len(each) <= MOST_WITH_PERPLEXITY
    metrics = [name for name in each[-1].get("metrics", "").split(",") if name]
    counts = [by_group(line, "tokens") for line in each]
    is_alike = all(count == counts[0] for count in counts)
    has_bits = is_text(each) and (kind == SOURCE or not is_alike)

    def columns(title: str) -> list[str]:
        first, *others = lines
        return [f"{title} {first}", *others]

    counted = "tokens" if in_nats else "counted"
    header = [kind, *([counted] if is_alike else columns(counted))]
    changes = ["change"] if len(each) == 2 else [f"change {x}" for x in [*lines][1:]]
    header += columns("loss") + columns("ppl") * has_perplexity + changes * is_alike
    header += columns("bits/byte") * has_bits
    header += [cell for name in metrics for cell in columns(name)]
    rows = []
    means = ["bits_per_byte"] * has_bits + metrics
    shown = counts[: 1 if is_alike else None]

    groups = sorted(set().union(*(by_group(line, "loss") for line in each)))
    for group in [] if groups == [UNNAMED] else groups:  # It would repeat the total.
        others = [by_group(x, name).get(group) for name in means for x in each]
        tokens = [count.get(group, 0) for count in shown]
        losses = [by_group(line, "loss").get(group) for line in each]
        label = group_label(group, kind)
        rows.append(_row(label, tokens, losses, has_perplexity, is_alike, others))
    others = [line.get(name) for name in means for line in each]
    tokens, losses = [sum(x.values()) for x in shown], [x["loss"] for x in each]
    rows.append(_row(TOTAL, tokens, losses, has_perplexity, is_alike, others))
    return [header, *rows]


def perplexity(loss: float) -> float:
    """The perplexity of a loss in nats per token; finite for every finite loss."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def comparable(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations of the data that the last one measured.

    A run that was resumed with other data has evaluations of both data sets, and
    their losses say nothing about each other. Lines of earlier versions do not name
    their data: there, other groups or numbers of tokens tell it.
    """
    last = evaluations[-1] if evaluations else {}

    def is_alike(line: Mapping[str, Any]) -> bool:
        marks = {x["data"] for x in (line, last) if "data" in x}
        return len(marks) < 2 and by_group(line, "tokens") == by_group(last, "tokens")

    return [*itertools.takewhile(is_alike, reversed(evaluations))][::-1]


def _row(
    name: str,
    tokens: Sequence[int],
    losses: Sequence[float | None],
    has_perplexity: bool,
    has_change: bool,
    others: Sequence[float | None],
) -> list[str]:
    first = losses[0]
    perplexities = [None if x is None else perplexity(x) for x in losses]
    changes = [None if None in (x, first) else x - first for x in losses[1:]]
    return [
        name,
        *(f"{count:,}" for count in tokens),
        *_cells(losses, ".3f"),
        *_cells(perplexities * has_perplexity, ".2f"),
        *_cells(changes * has_change, "+.3f"),
        *_cells(others, ".3f"),
    ]


def _cells(values: Sequence[float | None], form: str) -> list[str]:
    return ["-" if value is None else format(value, form) for value in values]


def tabulate_measures(measures: Sequence[AnswerMeasure]) -> Table:
    """Metrics of answers that apply to some row; empty without them."""
    header = ["answers", "unit", "rows", "base", "tuned", "95 % interval", "verdict"]
    rows = [
        [
            x.name,
            x.unit,
            str(x.rows),
            "-" if x.base is None else f"{x.base:.3f}",
            f"{x.tuned:.3f}",
            "-" if x.low is None else f"{x.low:+.3f} to {x.high:+.3f}",
            x.verdict or "-",
        ]
        for x in measures
        if x.tuned is not None
    ]
    return [header, *rows] if rows else []


def tabulate_wall_time(seconds: Sequence[tuple[str, float]]) -> Table:
    """Seconds and share of each phase; empty without phases."""
    if not seconds:
        return []
    total = sum(s for _, s in seconds) or 1.0
    rows = [[name, f"{s:,.1f}", f"{s / total:.1%}"] for name, s in seconds]
    return [["phase", "seconds", "share"], *rows]


def tabulate_findings(findings: Sequence[Finding]) -> Table:
    """The findings of the doctor, with a remedy for each that forbids a start."""
    rows = [
        [
            "fails" if not x.ok else "look" if x.warns else "ok",
            x.name,
            x.text if x.ok or not x.remedy else f"{x.text}\n{x.remedy}",
        ]
        for x in findings
    ]
    return [["", "finding", "text"], *rows] if rows else []


def tabulate_starts(starts: Sequence[Mapping[str, Any]]) -> Table:
    """Each start of a `run.json` and how it ended, the newest first; empty without."""
    rows = [
        [
            *(str(x.get(name) or "") for name in ("began", "host", "devices")),
            "none" if x["first"] is None else f"{x['first']:,} to {x['step']:,}",
            x["cause"] or "no end was recorded when this was written",
        ]
        for x in reversed(starts)
    ]
    return [["began", "where", "devices", "steps", "end"], *rows] if rows else []
