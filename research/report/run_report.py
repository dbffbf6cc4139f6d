"""What a run leaves for people: the loss plot, the table, the answers."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from research.runs.metrics_file import read_metrics


@dataclasses.dataclass(frozen=True)
class Answer:
    """One held-out prompt and what each model makes of it."""

    category: str
    prompt: str
    base: str
    adapted: str
    reference: str


def plot(folder: Path, title: str) -> Path:
    """Draws `loss.png` from `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    lines = read_metrics(folder)
    train = [line for line in lines if line["kind"] == "train"]
    held = [line for line in lines if line["kind"] == "eval"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    steps = [line["step"] for line in train]
    losses = [line["loss"] for line in train]
    left.plot(steps, losses, color="0.75", linewidth=1, label="train, each step")
    left.plot(steps, _smoothed(losses), color="C0", label="train, smoothed")
    eval_steps = [line["step"] for line in held]
    left.plot(
        eval_steps, [line["loss"] for line in held], "o-", color="C3", label="held out"
    )
    left.set(xlabel="step", ylabel="loss, nats per trained token", title=title)
    left.legend()
    key = "bits_by_group" if is_text(held) else "by_group"
    for group in sorted({name for line in held for name in line[key]}):
        values = [line[key].get(group, math.nan) for line in held]
        right.plot(eval_steps, values, "o-", markersize=3, label=group or "(none)")
    what = "held-out bits per byte" if is_text(held) else "held-out loss per category"
    right.set(xlabel="step", title=what)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _smoothed(values: list[float], decay: float = 0.85) -> list[float]:
    """Exponential average, corrected for its start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def is_text(held: list[dict[str, Any]]) -> bool:
    """Whether these evaluations are of whole texts, in bits per byte too."""
    return held[-1]["bits_per_byte"] is not None


def table(folder: Path) -> list[list[str]]:
    """A header, and a row a group: losses and perplexities before and after."""
    held = [line for line in read_metrics(folder) if line["kind"] == "eval"]
    before, after = held[0], held[-1]
    text = is_text(held)
    first, last = ("start", "end") if text else ("base", "tuned")
    header = ["source" if text else "category", "tokens", f"loss {first}", last]
    header += [f"ppl {first}", last, "change"]
    rows = [
        _row(name or "(none)", before["tokens"][name], before["by_group"][name], loss)
        for name, loss in sorted(after["by_group"].items())
    ]
    rows.append(
        _row("all", sum(before["tokens"].values()), before["loss"], after["loss"])
    )
    if text:
        header += [f"bits/byte {first}", last]
        names = sorted(after["by_group"])
        pairs = [[x["bits_by_group"][n] for x in (before, after)] for n in names]
        pairs.append([x["bits_per_byte"] for x in (before, after)])
        for row, pair in zip(rows, pairs, strict=True):
            row += [f"{value:.3f}" for value in pair]
    return [header, *rows]


def _row(name: str, tokens: int, before: float, after: float) -> list[str]:
    return [
        name,
        f"{tokens:,}",
        f"{before:.3f}",
        f"{after:.3f}",
        f"{math.exp(min(before, 700)):.2f}",
        f"{math.exp(min(after, 700)):.2f}",
        f"{after - before:+.3f}",
    ]


def show_table(console: Console, folder: Path) -> None:
    header, *rows = table(folder)
    shown = Table(title=f"held out, {header[2][5:]} and {header[3]}")
    shown.title_justify = "left"
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*row, style="bold" if row[0] == "all" else "")
    console.print(shown)


def show_answers(console: Console, answers: list[Answer]) -> None:
    for answer in answers:
        console.print(Panel(Text(answer.prompt), title=answer.category, style="dim"))
        side_by_side = Table(show_lines=True, expand=True)
        for name in ("base", "tuned", "reference"):
            side_by_side.add_column(name, ratio=1)
        side_by_side.add_row(
            *map(Text, (answer.base, answer.adapted, answer.reference))
        )
        console.print(side_by_side)


def answers_as_markdown(answers: list[Answer]) -> list[str]:
    lines: list[str] = []
    for answer in answers:
        lines += ["", f"## A held-out prompt: {answer.category}", ""]
        for name in ("prompt", "base", "adapted", "reference"):
            lines += [f"**{name}**", "", quoted(getattr(answer, name)), ""]
    return lines


def quoted(text: str) -> str:
    """A Markdown quotation that keeps line breaks."""
    return "> " + text.replace("\n", "\n> ")


def show_time(console: Console, seconds: Sequence[tuple[str, float]]) -> None:
    """The table of where the wall time of a run went, by phase."""
    header, *rows = time_table(seconds)
    shown = Table(title="wall time, all starts", title_justify="left")
    for name in header:
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for row in rows:
        shown.add_row(*row, style="bold" if row[0] == "step" else "")
    console.print(shown)


def time_table(seconds: Sequence[tuple[str, float]]) -> list[list[str]]:
    """A header, and a row a phase."""
    total = sum(s for _, s in seconds) or 1.0
    rows = [[name, f"{s:,.1f}", f"{s / total:.1%}"] for name, s in seconds]
    return [["phase", "seconds", "share"], *rows]


def write_markdown(
    folder: Path,
    facts: dict[str, Any],
    said: list[str],
    seconds: Sequence[tuple[str, float]],
) -> Path:
    """`report.md`: the same for reading later.

    Args:
      facts: lines of the beginning, by name.
      said: lines of what the model said.
      seconds: of wall time, by phase.
    """
    lines = [f"# {folder.name}", "", "![loss](loss.png)", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for header, *rows in (table(folder), time_table(seconds)):
        lines += ["", f"| {' | '.join(header)} |"]
        lines += ["|---" + "|---:" * (len(header) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    path = folder / "report.md"
    path.write_text("\n".join(lines + said) + "\n", encoding="utf-8")
    return path
